"""What MODEL means, and that what is built has the bits that ``convert`` writes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import spikepatch
from spikepatch.apply.values.initialiser import own_values
from spikepatch.errors import BadSource, Refused, SpikepatchError
from spikepatch.quiet import quiet
from spikepatch.source.meta import skeleton
from spikepatch.training.entries import Entry, build, check_causal, parse_entries, tokenizer_of
from spikepatch.training.run_identity import TrainedModel
from tests.architectures import ids, tiny_config
from tests.residual.configs import model_class, tiny_config_for

pytestmark = pytest.mark.slow  # processes, trainings, or models at full size

Save = Callable[..., Path]


@pytest.fixture
def gpt2(tmp_path: Path) -> str:
    """A folder with only a config.json."""
    return config_only(tmp_path / "gpt2", "gpt2")


def config_only(folder: Path, model_type: str, **changes: Any) -> str:
    tiny_config(model_type, **changes).save_pretrained(folder)
    return str(folder)


def entry(source: str, recipe: str | None = None, **options: Any) -> Entry:
    (found,) = parse_entries([f"model={source}" + (f"@{recipe}" if recipe else "")], **options)
    return found


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return stored(folder)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    assert one
    assert one.keys() == other.keys()
    return all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


# what an argument means


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("arch:gpt2", ("gpt2", "arch:gpt2", None, False)),
        ("arch:gpt2@scaled-embed", ("gpt2-scaled-embed", "arch:gpt2", "scaled-embed", True)),
        ("base=arch:gpt2", ("base", "arch:gpt2", None, False)),
        ("my.own_1=arch:gpt2@embed-ln", ("my.own_1", "arch:gpt2", "embed-ln", True)),
        ("{}", ("gpt2", "{}", None, False)),
        ("{}/@xavier", ("gpt2-xavier", "{}/", "xavier", False)),
        ("x={}@{}/own.toml", ("x", "{}", "{}/own.toml", True)),
        ("{}@{}/own.toml", ("gpt2-own", "{}", "{}/own.toml", True)),
    ],
)
def test_an_argument(argument: str, expected: tuple[Any, ...], gpt2: str) -> None:
    Path(gpt2, "own.toml").write_text('name = "own"\n[[transform]]\nkind = "small_init"\n')
    values = tuple(value.replace("{}", gpt2) if isinstance(value, str) else value for value in expected)
    (found,) = parse_entries([argument.replace("{}", gpt2)])
    assert dataclasses.astuple(found.model) == values


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2"])
def test_reading_later_tokens_is_measured(model_type: str, tmp_path: Path) -> None:
    """transformers builds encoders as causal models too, and only logs that they are none."""
    source = config_only(tmp_path / "both", model_type)
    decoder = config_only(tmp_path / "decoder", model_type, is_decoder=True)
    check_causal(build(entry(decoder), seed=0), decoder, 64)
    model = build(entry(source), seed=0)
    if model_type == "gpt2":
        check_causal(model, source, 64)
        return
    with pytest.raises(Refused, match=r"(?s)reads later tokens.*logits change by up to .*is_decoder"):
        check_causal(model, source, 64)
    assert model.training


def test_a_model_that_needs_more_than_token_ids() -> None:
    """Its tokens come in several codebooks."""
    with quiet():
        model = model_class("musicgen", "causal")._from_config(tiny_config_for("musicgen", "causal"))
    with pytest.raises(Refused, match=r"does not run on token ids alone\n.*why: \w+Error: .*\n.*of text"):
        check_causal(model, "musicgen", 64)


def test_a_path_with_our_characters(tmp_path: Path) -> None:
    """What exists is taken as it stands."""
    folder = config_only(tmp_path / "lr=1@2", "gpt2")
    models = [each.model for each in parse_entries([folder, f"a={folder}@wang"])]
    assert models == [TrainedModel("lr-1-2", folder, None, False), TrainedModel("a", folder, "wang", False)]


def test_a_patched_folder_is_known(gpt2: str, tmp_path: Path) -> None:
    for recipe in ("scaled-embed", "vanilla"):
        spikepatch.convert(gpt2, tmp_path / recipe, recipe=recipe)
    found = parse_entries([gpt2, str(tmp_path / "scaled-embed"), str(tmp_path / "vanilla")])
    assert [each.model.patched for each in found] == [False, True, False]


def test_refused_arguments(gpt2: str, tmp_path: Path, save_tiny: Save) -> None:
    shutil.copytree(gpt2, tmp_path / "data")
    classifier = save_tiny("gpt2", auto="AutoModelForSequenceClassification", **size("gpt2"))
    cases: dict[tuple[str, ...], tuple[str, ...]] = {
        (gpt2, gpt2): ("two models have the name 'gpt2'", f"remedy: name one of them: NAME={gpt2}"),
        ("arch:gpt2", "gpt2=arch:llama"): ("two models have the name 'gpt2'",),
        ("arch:gpt2@scaled",): ("arch:gpt2@scaled: there is no recipe 'scaled'", "did you mean scaled-embed?"),
        ("-x=arch:gpt2@wang",): ("'-x' cannot be the name of a model", "NAME=arch:gpt2@wang"),
        ("=arch:gpt2",): ("'' cannot be the name of a model",),
        (str(tmp_path / "data"),): ("'data' cannot be the name of a model", "another file of the run"),
        ("arch:gpt3",): ("the model type 'gpt3' is unknown",),
        ("./nowhere",): ("./nowhere: does not exist",),
        (str(classifier),): ("it is no causal language model", "GPT2ForSequenceClassification", "AutoModelForCausalLM"),
        ("arch:t5",): ("it is no causal language model", "the next token"),
    }
    for arguments, expected in cases.items():
        with pytest.raises(SpikepatchError) as caught:
            parse_entries(arguments)
        assert all(words in str(caught.value) for words in expected), caught.value


def size(model_type: str) -> dict[str, Any]:
    """What makes a config of the type tiny."""
    config = tiny_config(model_type).to_diff_dict()
    return {name: value for name, value in config.items() if name not in ("architectures", "model_type")}


# what is built


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mixtral", "mamba"])
@pytest.mark.parametrize("recipe", ["scaled-embed", "embed-ln", "vanilla"])
def test_a_fresh_model_has_the_bits_of_convert(model_type: str, recipe: str, tmp_path: Path) -> None:
    source = config_only(tmp_path / "source", model_type)
    spikepatch.convert(source, tmp_path / "out", recipe=recipe, seed=3)
    torch.manual_seed(1)
    model = build(entry(source, recipe), seed=3)
    assert model.training
    assert same_bits(saved(model, tmp_path / "saved"), stored(tmp_path / "out"))
    converted = build(entry(str(tmp_path / "out")), seed=9)
    assert same_bits(converted.state_dict(), model.state_dict())
    assert not same_bits(build(entry(source, recipe), seed=4).state_dict(), model.state_dict())


def test_a_fresh_model_of_a_bfloat16_config(tmp_path: Path) -> None:
    """Weights to train on are float32, with the bits that are drawn in float32."""
    source = config_only(tmp_path / "source", "llama", dtype="bfloat16")
    spikepatch.convert(source, tmp_path / "out", dtype="float32")
    model = build(entry(source, "scaled-embed"), seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert same_bits(saved(model, tmp_path / "saved"), stored(tmp_path / "out"))
    assert {p.dtype for p in build(entry(source), seed=0).parameters()} == {torch.float32}


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mixtral", "mamba", "opt"])
def test_an_unpatched_fresh_model(model_type: str, tmp_path: Path) -> None:
    """By the architecture's own initialiser, through our seeds; what a recipe leaves to it has the same bits."""
    source = config_only(tmp_path / "source", model_type)
    torch.manual_seed(1)
    model = build(entry(source), seed=5)
    torch.manual_seed(2)
    assert same_bits(build(entry(source), seed=5).state_dict(), model.state_dict())
    own = own_values(skeleton(model), 5)
    for name, parameter in model.named_parameters():
        assert torch.equal(own(name), parameter), name  # type: ignore[arg-type]
    assert len(list(model.parameters())) > 10
    patched = build(entry(source, "scaled-embed"), seed=5)
    plan = spikepatch.plan(source, "scaled-embed", reinit="all", seed=5)
    left = {skip.target for skip in plan.skips} & {name for name, _ in model.named_parameters()} - plan.written
    assert left
    for name in left:
        assert torch.equal(patched.get_parameter(name), model.get_parameter(name)), name


def test_learned_weights_are_kept(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama", **size("llama"))
    learned = stored(source)
    plain = build(entry(str(source)), seed=0)
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert same_bits(saved(plain, tmp_path / "plain"), learned)
    spikepatch.convert(str(source), tmp_path / "out", reinit="none", dtype="float32")
    model = build(entry(str(source), "scaled-embed"), seed=0)
    assert same_bits(saved(model, tmp_path / "saved"), stored(tmp_path / "out"))
    loaded = build(entry(str(tmp_path / "out")), seed=0)
    with torch.no_grad():
        token_ids = ids(plain)
        logits = [each.eval()(token_ids).logits for each in (model, loaded, plain)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_learned_bfloat16_weights_become_float32(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama", dtype="bfloat16", **size("llama"))
    half = {name: tensor.bfloat16() for name, tensor in stored(source).items()}
    model = build(entry(str(source)), seed=0)
    assert same_bits(saved(model, tmp_path / "saved"), {name: tensor.float() for name, tensor in half.items()})


def test_a_new_recipe_takes_the_place_of_an_old_one(save_tiny: Save, tmp_path: Path) -> None:
    source = str(save_tiny("llama", **size("llama")))
    spikepatch.convert(source, tmp_path / "patched", reinit="none", factor=2.0)
    again = build(entry(str(tmp_path / "patched"), "scaled-embed"), seed=0)
    once = build(entry(source, "scaled-embed"), seed=0)
    assert same_bits(again.state_dict(), once.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(ids(once)).logits, once.eval()(ids(once)).logits)
    spikepatch.convert(source, tmp_path / "normed", reinit="none", recipe="embed-ln")
    with pytest.raises(Refused, match="the learned norm behind the embedding cannot be replaced"):
        build(entry(str(tmp_path / "normed"), "scaled-embed"), seed=0)


def test_generated_code_is_compared_and_not_run(gpt2: str, tmp_path: Path) -> None:
    """So a folder of ours needs no flag."""
    spikepatch.convert(gpt2, tmp_path / "out")
    (code,) = (tmp_path / "out").glob("modeling_spikepatch_*.py")
    code.write_text(code.read_text() + "\nraise SystemExit('this was run')\n")
    for call in (lambda: parse_entries([str(tmp_path / "out")]), lambda: build(entry(str(tmp_path / "out")), seed=0)):
        with pytest.raises(Refused, match=f"{code.name} is not the file that this version of spikepatch writes"):
            call()


def test_what_cannot_be_built(gpt2: str, save_tiny: Save, tmp_path: Path) -> None:
    spikepatch.convert(gpt2, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(Refused, match=r"out: it is patched, and has no weights\n.*\n.*@scaled-embed draws them afresh"):
        build(entry(str(tmp_path / "out")), seed=0)
    assert same_bits(
        build(entry(str(tmp_path / "out"), "scaled-embed"), seed=0).state_dict(),
        build(entry(gpt2, "scaled-embed"), seed=0).state_dict(),
    )
    source = save_tiny("llama", **size("llama"))
    weights = load_file(source / "model.safetensors")
    weights.pop("model.norm.weight")
    from safetensors.torch import save_file

    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        BadSource, match=r"the checkpoint does not fit the architecture\n.*model.norm.weight is missing"
    ):
        build(entry(str(source)), seed=0)


# tokenizers


def test_bytes_where_there_is_no_tokenizer(gpt2: str, tmp_path: Path) -> None:
    found = tokenizer_of(parse_entries([gpt2, "arch:llama"]))
    assert (found.name, found.eos, found.size, found.limit, found.narrowest) == ("bytes", 255, 256, 500, "gpt2")
    assert [found.encode(["aé"])[0].tolist()] == [[97, 195, 169]]
    small = config_only(tmp_path / "small", "gpt2", vocab_size=255)
    with pytest.raises(Refused, match=r"small: the model's vocabulary .*\n.*bytes gives the id 255, and .* 255 ids"):
        tokenizer_of(parse_entries([gpt2, small]))
    exact = config_only(tmp_path / "exact", "gpt2", vocab_size=256)
    assert tokenizer_of(parse_entries([exact])).vocabulary == 256


def test_one_tokenizer_for_all(smollm2: Path, gpt2_tokenizer: Path, gpt2: str, tmp_path: Path) -> None:
    def with_tokenizer(name: str, files: Path, vocabulary: int) -> str:
        folder = config_only(tmp_path / name, "gpt2", vocab_size=vocabulary)
        for file in files.glob("*"):
            if file.name.startswith(("tokenizer", "vocab", "merges", "special")):
                shutil.copyfile(file, Path(folder, file.name))
        return folder

    one = with_tokenizer("one", smollm2, 49152)
    spikepatch.convert(one, tmp_path / "patched")
    found = tokenizer_of(parse_entries([str(smollm2), one, str(tmp_path / "patched")]))
    assert (found.size, found.eos, found.vocabulary) == (49152, 2, 49152)
    assert tokenizer_of(parse_entries([with_tokenizer("large", smollm2, 60_000), one])).narrowest == "one"

    other = with_tokenizer("other", gpt2_tokenizer, 50257)
    for two, why in (
        (other, "has 49152 ids, that of other .* 50257"),
        (gpt2, "has 49152 ids, that of gpt2 .bytes. 256"),
    ):
        with pytest.raises(Refused, match=rf"the models do not have the same tokenizer\n.*{why}.*\n.*same tokenizer"):
            tokenizer_of(parse_entries([one, two]))
    with pytest.raises(Refused, match=r"tight: the model's vocabulary is too small for its tokenizer"):
        tokenizer_of(parse_entries([with_tokenizer("tight", smollm2, 300)]))


def test_tokenizers_that_cannot_be_used(gpt2: str, gpt2_tokenizer: Path) -> None:
    Path(gpt2, "tokenizer.json").write_text("{}")
    with pytest.raises(BadSource, match=r"gpt2: its tokenizer cannot be used\n.*\n.*trained on bytes"):
        tokenizer_of(parse_entries([gpt2]))
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        shutil.copyfile(gpt2_tokenizer / name, Path(gpt2, name))
    Path(gpt2, "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(BadSource, match=r'no token that ends a text\n.*\n.*"eos_token" in tokenizer_config.json'):
        tokenizer_of(parse_entries([gpt2]))
