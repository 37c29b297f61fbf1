"""The command: its help teaches, its errors are one line, its JSON has what it promises."""

import json
import subprocess
import sys

import pytest
from test_models import PROMPTS, needs_embedded
from tiny_chat import tiny_tokenizer
from tiny_models import tiny_model

import speckv
from speckv import cli, demo


def run_main(monkeypatch, capsys, *arguments):
    """The command inside this process: its exit status and what it printed."""
    monkeypatch.setattr(sys, "argv", ["speckv", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, capsys.readouterr()


@needs_embedded
def test_generate_prints_json(monkeypatch, capsys):
    status, result = run_main(monkeypatch, capsys, "generate", "--prompt", PROMPTS["code"], "--compression", "nf4",
                              "--policy", "fixed:4", "--max-new-tokens", "24", "--json")
    assert status == 0, result.err
    printed = json.loads(result.out)
    assert {"text", "tokens", "steps", "tokens_per_second", "acceptance_rate"} <= printed.keys()
    assert printed["tokens"] == 24 and 0 < printed["steps"] <= 24
    assert "def" in printed["text"] and printed["tokens_per_second"] > 0


@needs_embedded
def test_generate_streams_the_whole_text(tmp_path, monkeypatch, capsys):
    arguments = ("generate", "--max-new-tokens", "20", "--policy", "fixed:2", "--prompt")
    streamed = subprocess.run([sys.executable, "-m", "speckv.cli", *arguments, "-"], input=PROMPTS["chat"],
                              capture_output=True, text=True, timeout=300, cwd=tmp_path)
    _, whole = run_main(monkeypatch, capsys, *arguments, PROMPTS["chat"], "--json")
    assert streamed.stdout.strip() == json.loads(whole.out)["text"].strip()
    assert "20 tokens in" in streamed.stderr


@pytest.mark.parametrize("arguments, words", [
    (["--policy", "fixed:-2"], "gamma is -2"),
    (["--policy", "clever"], "unknown policy 'clever': choose off, fixed:N with N draft tokens a step, or adaptive"),
    (["--compression", "int3"], "unknown compression 'int3'"),
], ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_a_mistake_ends_in_one_line_that_tells_the_way_out(arguments, words, monkeypatch, capsys):
    status, printed = run_main(monkeypatch, capsys, "generate", "--prompt", "x", *arguments)
    assert status == 2
    assert words in printed.err and "Traceback" not in printed.err
    assert len(printed.err.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["generate", "demo", "distill", "doctor", "profile", "train", "compare", "paper"])
def test_every_command_has_help(command, monkeypatch, capsys):
    status, printed = run_main(monkeypatch, capsys, command, "--help")
    assert status == 0 and "Usage" in printed.out


def test_help_needs_no_pytorch():
    code = "import speckv.cli, sys; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_doctor_names_the_backend_of_every_op(monkeypatch, capsys):
    _, printed = run_main(monkeypatch, capsys, "doctor")
    for op in ("draft_sample", "plan_gamma", "draft_step", "verify_chain", "linear_int8"):
        assert op in printed.out
    assert speckv.kernels.serving()["cpu"][0] in printed.out


@needs_embedded
def test_demo_prints_a_table_with_every_cell(monkeypatch, capsys):
    cells = demo.run("smollm2", "smollm2", ["bf16"], ["fixed:2", "fixed:1"], max_new_tokens=8)
    printed = capsys.readouterr().out
    assert [cell.task for cell in cells] == list(demo.PROMPTS)
    for cell in cells:
        assert cell.plain.new_tokens == 8
        for output in cell.speculative.values():
            assert output.new_tokens == 8
            assert f"{output.tokens_per_second / cell.plain.tokens_per_second:.2f}×" in printed


@pytest.mark.parametrize("arguments, words", [
    (["--kind", "head"], "say --output FOLDER"),
    (["--output", "drafter", "--hours", "1", "--epochs", "2"], "give one of them"),
    (["--output", "drafter", "--hours", "0"], "must be positive"),
    (["--output", "drafter", "--kind", "tree"], "choose one of lm, head"),
], ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_a_distillation_that_makes_no_sense_is_refused_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, printed = run_main(monkeypatch, capsys, "distill", *arguments)
    assert status == 2 and words in printed.err and len(printed.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["head", "lm"])
def test_distill_makes_a_drafter_that_generate_uses(kind, tmp_path, monkeypatch, capsys):
    model = tiny_model()
    model.generation_config.eos_token_id = 3
    model.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    target = ["--target", str(tmp_path / "target")]
    work = ["--work", str(tmp_path / "work"), "--tokens", "1"]
    settings = [*target, *work, "--kind", kind, "--layers", "1", "--epochs", "1"]
    status, printed = run_main(monkeypatch, capsys, "distill", *target, *work, "--write-only")
    assert status == 0 and "all text is written" in printed.out
    status, printed = run_main(monkeypatch, capsys, "distill", *settings, "--output", str(tmp_path / "drafter"))
    assert status == 0 and "held-out greedy match" in printed.out and "accepted (greedy target)" in printed.out
    further = ["--output", str(tmp_path / "further"), "--start-from", str(tmp_path / "drafter")]
    status, printed = run_main(monkeypatch, capsys, "distill", *settings, *further)
    assert status == 2 and "--no-resume" in printed.err
    status, printed = run_main(monkeypatch, capsys, "generate", *target, "--draft", str(tmp_path / "drafter"),
                               "--prompt", "w1 w2", "--max-new-tokens", "10", "--json")
    assert status == 0 and json.loads(printed.out)["tokens"] <= 10
    filters = ["--temperature", "0.8", "--top-k", "5", "--top-p", "0.9", "--min-p"]
    for min_p, expected in (("0.05", 0), ("5", 2)):
        status, printed = run_main(monkeypatch, capsys, "generate", *target, "--draft", str(tmp_path / "drafter"),
                                   "--prompt", "w1 w2", "--max-new-tokens", "10", "--json", *filters, min_p)
        assert status == expected and ("min_p is 5.0" in printed.err) == (status == 2)
