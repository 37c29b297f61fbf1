"""The Python of the README and of the pages in docs/ runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_models import needs_embedded

ROOT = Path(__file__).parent.parent


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@needs_embedded
def test_the_readmes_python_runs_in_an_empty_folder(tmp_path):
    (tmp_path / "example.py").write_text("\n".join(blocks("README.md")))
    result = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert re.search(r"[1-9][\d.]* tokens/s, [1-9]\d*% of the draft accepted", result.stdout)


@needs_embedded
@pytest.mark.parametrize("page, count, words", [
    ("docs/use.md", 5, r"[1-9]\d* of \d+ draft tokens accepted"),
    ("docs/transformers.md", 4, r"[1-9]\d* of \d+ draft tokens accepted"),
])
def test_the_examples_of_a_page_run_one_after_the_other(page, count, words, capsys):
    found, names = blocks(page), {}
    for block in found:
        exec(compile(block, page, "exec"), names)
    assert len(found) == count and re.search(words, capsys.readouterr().out)
    if "answer" in names:
        assert len(names["answer"][0]["generated_text"][-1]["content"]) > 20
