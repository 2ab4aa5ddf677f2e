"""Every golden case, through the product. `scripts/check_golden.py DIR` runs other folders in the same way."""

from pathlib import Path

import pytest

from tests.golden.check import needs_extra, run

FILES = sorted(Path(__file__).parent.rglob("*.safetensors"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_case(file):
    verdict, line, error = run(file)
    if needs_extra(error):
        pytest.skip(line)
    if verdict == "FAIL" and error:
        raise error
    assert verdict == "pass", line
