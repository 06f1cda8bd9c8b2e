"""Streams of unusual shape, each a plain module of a few lines: what is proven, and what is refused and why."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import spikepatch
from spikepatch.errors import Refused
from spikepatch.residual.map import Between
from tests.residual.test_stream import EXAMPLE, Block

WIDTH = 16


class Model(nn.Module):
    """Tokens, a stream that ``stream`` computes, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50, bias=False)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(2))

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.stream(self.tokens(ids)))
        return logits


def branch(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What ``block`` adds to its input."""
    assert isinstance(block, Block)
    out: torch.Tensor = block.down(torch.relu(block.up(block.norm(x))))
    return out


class Sorted(Model):
    """Without padding: tokens in one row, whose order the ids decide between the blocks."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.flatten()
        x = self.tokens(ids)
        for block in self.blocks:
            x = (x + branch(block, x))[ids.argsort()]
        logits: torch.Tensor = self.head(x)
        return logits


def test_rows_that_the_ids_choose_of_the_stream_are_the_stream() -> None:
    found = spikepatch.inspect(Sorted(), example_inputs=EXAMPLE)
    assert (found.proven, found.sublayers, found.placement) == (True, 2, "pre-norm")
    assert [e.parameter for e in found.embeddings] == ["tokens.weight"]


class Towers(Model):
    """The outputs of two streams are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Model()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, y = self.tokens(ids), self.other.tokens(ids)
        for block, beside in zip(self.blocks, self.other.blocks, strict=True):
            x, y = x + branch(block, x), y + branch(beside, y)
        logits: torch.Tensor = self.head(x) @ self.other.head(y).mT
        return logits


def test_a_sum_beside_the_stream_is_named_as_one() -> None:
    found = spikepatch.inspect(Towers(), example_inputs=EXAMPLE)
    assert not found.proven
    assert len(found.leaks) == 1
    assert "a sum beside this stream" in found.leaks[0]


class Reversible(Model):
    """Two tracks, each of which reads the other; the head reads both side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2 * WIDTH, 50, bias=False)

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.cat([x, x], dim=-1).chunk(2, dim=-1)
        for block in self.blocks:
            first, second = second, first + branch(block, second)
        return torch.cat([first, second], dim=-1)


class Pooled(Model):
    """Half of the positions in the second block, and all of them again, added to where they were, before the head."""

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        whole = x + branch(self.blocks[0], x)
        half = nn.functional.avg_pool2d(whole[:, None], (2, 1))[:, 0]  # (batch, tokens / 2, width)
        half = half + branch(self.blocks[1], half)
        return whole + half.repeat_interleave(2, dim=1)


class ByConvolution(Model):
    """Positions from a convolution over the neighbours; the embedding is projected first, as in a speech encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.positions = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        x = self.project(x)
        x = x + nn.functional.gelu(self.positions(x.transpose(1, 2))).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


class Replaced(Model):
    """The rows of one token are replaced by a learned one."""

    def __init__(self) -> None:
        super().__init__()
        self.end = nn.Parameter(torch.randn(WIDTH))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        x[ids == 3] = self.end
        logits: torch.Tensor = self.head(self.blocks[1](self.blocks[0](x)))
        return logits


class Interpolated(Model):
    """Each block moves the stream a learned part of the way towards its own, normed, result."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.norm = nn.Parameter(torch.rand(WIDTH)), nn.LayerNorm(WIDTH)

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + self.rate * (self.norm(branch(block, x)) - x)
        return x


class ByPointwiseConvolution(Model):
    """An MLP written as convolutions of size 1, as one with its channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(WIDTH, 2 * WIDTH, 1), nn.Conv1d(2 * WIDTH, WIDTH, 1, groups=2)
        self.blocks = nn.ModuleList()

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.up(x.transpose(1, 2)))).transpose(1, 2)
        return x + out


class GroupNormed(Model):
    """Each block's result is normed in groups of channels, with a bias that stays when the block is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, WIDTH)

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + self.norm(branch(block, x).transpose(1, 2)).transpose(1, 2)
        return x


class Mixing(Model):
    """Sub-layers without attention, and something between the embedding and the first of them."""

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x)
        return x


class BehindTanh(Mixing):
    def begin(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


class BehindClamp(Mixing):
    def begin(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-3, 3)


class BehindGelu(Mixing):
    def begin(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(x)


class BehindFeedForward(Mixing):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.first(x)
        return y


class BehindConvolution(Mixing):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.first(x.transpose(1, 2)).transpose(1, 2)
        return y


class Cell(Model):
    """A recurrent layer of torch's own, whose state is projected."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.cell = nn.LayerNorm(WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.down = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList()

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.cell(self.norm(x))[0]
        return self.after(x, states)

    def after(self, x: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return x + torch.as_tensor(self.down(states))


class CellAlone(Cell):
    """Its state is added as it is."""

    def after(self, x: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return x + states


class WeightNormed(Model):
    """The weight is computed by a hook of the old kind, which leaves the module with a tensor that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nn.utils.weight_norm(block.down)  # type: ignore[type-var]

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


PROVEN = {
    BehindFeedForward: ["blocks.0.down.weight", "blocks.1.down.weight"],
    BehindConvolution: ["blocks.0.down.weight", "blocks.1.down.weight"],
    Reversible: ["blocks.0.down.weight", "blocks.1.down.weight"],
    Pooled: ["blocks.0.down.weight", "blocks.1.down.weight"],
    ByConvolution: ["blocks.0.down.weight", "blocks.1.down.weight"],
    Replaced: ["blocks.0.down.weight", "blocks.1.down.weight"],
    Interpolated: ["blocks.0.down.weight", "blocks.1.down.weight"],
    ByPointwiseConvolution: ["down.weight"],
    GroupNormed: ["blocks.0.down.weight", "blocks.1.down.weight"],
}


@pytest.mark.parametrize("kind", PROVEN)
def test_proven(kind: type[Model]) -> None:
    model = kind()
    residual = spikepatch.inspect(model, example_inputs=EXAMPLE)
    assert residual.proven, residual.leaks
    assert [p.parameter for p in residual.residual_projections] == PROVEN[kind]
    biases = [p.removesuffix("weight") + "bias" for p in PROVEN[kind]]
    assert [p.between[0] for p in residual.residual_projections] == [Between("bias", name) for name in biases]
    assert residual.width == WIDTH
    assert residual.sublayers == len(PROVEN[kind])
    assert {p.kind for p in residual.residual_projections} == {"mlp"}
    assert set(residual.reaches) == reached(model, biases)


def test_a_recurrent_layer() -> None:
    found = spikepatch.inspect(Cell(), example_inputs=EXAMPLE)
    assert found.proven, found.leaks
    assert [p.parameter for p in found.residual_projections] == ["down.weight"]


@pytest.mark.parametrize(
    ("kind", "low", "high"), [(BehindConvolution, 0.6, 1.2), (BehindFeedForward, 0.6, 0.8), (ByConvolution, 1.0, 1.3)]
)
def test_what_a_matrix_on_the_way_keeps_of_the_size(kind: type[Model], low: float, high: float) -> None:
    """A matrix is drawn to keep the size of what it multiplies; a rectifier keeps 1/sqrt(2) of it."""
    (embedding,) = spikepatch.inspect(kind(), example_inputs=EXAMPLE).embeddings
    assert not embedding.normed
    assert low < embedding.scale < high


def test_gain_and_bias_of_a_group_norm() -> None:
    norms = {norm.module: norm for norm in spikepatch.inspect(GroupNormed(), example_inputs=EXAMPLE).norms}
    assert (norms["norm"].gain, norms["norm"].parameter, norms["norm"].bias) == ("w", "norm.weight", "norm.bias")


def reached(model: Model, biases: list[str]) -> set[str]:
    """By autograd: the parameters with gradient, other than the projections, while these and their biases are zero."""
    model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    cut = {*biases, *(name.removesuffix("bias") + "weight" for name in biases)}
    for name in cut:
        nn.init.zeros_(model.get_parameter(name))
    logits = model(EXAMPLE["ids"])
    (logits * torch.randn_like(logits)).sum().backward()
    live = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.ne(0).any())}
    return live - cut


class Recurrent(Model):
    """A loop over the positions, each of which reads the state that the one before has left."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.keep, self.leave = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        state, states = torch.zeros_like(x[:, 0]), []
        for i in range(x.shape[1]):
            state = torch.tanh(self.enter(x[:, i]) + self.keep(state))
            states.append(state)
        return torch.as_tensor(self.blocks[0](x + self.leave(torch.stack(states, dim=1))))


@pytest.mark.parametrize("tokens", [3, 6, 20])
def test_a_loop_over_the_positions_mixes_them(tokens: int) -> None:
    """However long the example is: no operation but the loop itself says so."""
    residual = spikepatch.inspect(Recurrent(), example_inputs={"ids": torch.arange(tokens)[None]})
    assert residual.proven, residual.leaks
    found = [(p.parameter, p.kind) for p in residual.residual_projections]
    assert found == [("leave.weight", "mixer"), ("blocks.0.down.weight", "mlp")]


# --- refused ---------------------------------------------------------------------------------------------------------


class Mixture(Model):
    """Each block reads a mixture of all earlier states, with weights that are computed from them."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, 1, bias=False)

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        states = [x]
        for block in self.blocks:
            states.append(branch(block, self.mixed(states)))
        return self.mixed(states)

    def mixed(self, states: list[torch.Tensor]) -> torch.Tensor:
        stacked = torch.stack(states, dim=-2)  # (batch, tokens, states, width)
        weights: torch.Tensor = self.query(stacked).softmax(dim=-2)
        return (stacked * weights).sum(dim=-2)


class Copies(Model):
    """The stream is kept in three copies."""

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        copies = x[:, :, None].expand(-1, -1, 3, -1)
        for block in self.blocks:
            copies = copies + branch(block, copies.mean(dim=2))[:, :, None]
        return copies.sum(dim=2)


class Latents(Model):
    """The stream begins with learned latents; the tokens are only attended to."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.key = nn.Parameter(torch.randn(1, 4, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        weights: torch.Tensor = (self.latents @ self.key(x).transpose(1, 2)).softmax(dim=-1)
        return self.latents + weights @ torch.sigmoid(self.key(x))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Mixture, "a set of states that the model mixes by computed weights"),
        (Copies, "hyper-connections: the stream is a set of 3 mixed copies"),
        (BehindTanh, r"the input is not a term of it, but goes through tanh \(the model itself\)"),
        (BehindClamp, r"the input is not a term of it, but goes through clamp \(the model itself\)"),
        (BehindGelu, r"the input is not a term of it, but goes through gelu \(the model itself\)"),
        (Latents, r"the input is not a term of it, but goes through products with weights \(key"),
    ],
)
def test_refused(kind: type[Model], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        spikepatch.inspect(kind(), example_inputs=EXAMPLE)


class Fourier(Model):
    """Tokens are mixed without any weight."""

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.fft.fft(x, dim=1).real
        return torch.as_tensor(self.blocks[0](x))


class Ignored(Model):
    """A sub-layer's input never arrives: a kernel that is not there gives zeros."""

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.blocks[0].down(torch.zeros_like(self.blocks[0].up(x)))  # type: ignore[operator]
        return torch.as_tensor(self.blocks[1](x))


@pytest.mark.parametrize(
    ("kind", "leak"),
    [
        (Fourier, "computed without any weight, so there is no projection to scale"),
        (CellAlone, "it is a gate, a product of computed values, in cell"),
        (WeightNormed, "its last matrix is no parameter, but computed by weight norm interface"),
        (Ignored, "blocks.0.down.weight: never reaches the output, with nothing cut either"),
    ],
)
def test_not_proven(kind: type[Model], leak: str) -> None:
    residual = spikepatch.inspect(kind(), example_inputs=EXAMPLE)
    assert not residual.proven
    assert any(leak in line for line in residual.leaks), residual.leaks
