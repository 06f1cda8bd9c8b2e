"""Run by test_generated in a fresh process: the class and the ids that AutoTokenizer gives for a folder and a text."""

from __future__ import annotations

import json
import sys

for absent in ("spikepatch", "spikepatch_transforms"):
    sys.modules[absent] = None  # type: ignore[assignment]

from transformers import AutoTokenizer  # noqa: E402

folder, text = sys.argv[1:]
trusted = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
untrusted = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
found = {"class": type(trusted).__name__, "trusted": trusted(text).input_ids, "untrusted": untrusted(text).input_ids}
sys.stdout.write(json.dumps(found))
