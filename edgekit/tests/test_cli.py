"""The command line: results on stdout, everything else on stderr, one status for each refusal."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import click
import pytest

import edgekit
from edgekit import cli as cli_module
from edgekit.cli import cli, main, write_report
from edgekit.encodings.visible import visible_lines
from edgekit.errors import ToolchainError, UsageError
from edgekit.plan import Choice
from edgekit.plan import make as make_plan
from edgekit.run import Runner
from edgekit.runtime.child import environment
from edgekit.tests.tiny.random_checkpoints import random_checkpoint
from edgekit.tests.witnesses.tiny_runner import DIALOGUE, QUESTION, THOUGHTS, thinking_runner_in
from edgekit.text.answer import Part


def run(capsys, *words):
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    said = capsys.readouterr()
    return exit_.value.code, said.out, said.err


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_explains_itself(name, capsys):
    status, out, _ = run(capsys, name, "--help")
    assert status == 0
    assert out.startswith(f"Usage: edgekit {name}")


def test_the_help_starts_with_three_commands_that_work_in_this_order(capsys):
    _, out, _ = run(capsys, "--help")
    assert (
        out.index("edgekit export demo")
        < out.index("edgekit run out")
        < out.index("edgekit validate out")
    )


SINGLE_VALUED = [
    (name, option.opts[-1])
    for name, command in sorted(cli.commands.items())
    for option in command.params
    if isinstance(option, click.Option) and not option.multiple and not option.is_flag
]


@pytest.mark.parametrize(("name", "option"), SINGLE_VALUED)
def test_an_option_given_twice_is_refused(name, option, capsys):
    status, out, err = run(capsys, name, option, "1", f"{option}=2")
    assert (status, out) == (2, "")
    assert f"{option} is given more than once" in err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x=false", False),
        ("x=False", False),
        ("x=TRUE", True),
        ("x=none", None),
        ("x=null", None),
        ("x=3", 3),
        ("x=-0.5", -0.5),
        ('x="3"', "3"),
        ("x=low effort", "low effort"),
        ("x=a=b", "a=b"),
        ("x=", ""),
        ("x=NaN", "NaN"),
        ('x=[{"a": 1}]', [{"a": 1}]),
        ('x={"a": 1, "a": 2}', '{"a": 1, "a": 2}'),
    ],
)
def test_a_variable_is_json_or_else_text(text, value):
    read = cli_module.template_variables([text])["x"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("texts", [["x"], ["=1"], ["a b=1"], ["x=1", "x=2"]])
def test_a_variable_without_a_name_of_its_own_is_refused(texts, capsys):
    words = [word for text in texts for word in ("--template-var", text)]
    status, out, err = run(capsys, "run", "absent", "Hi", *words)
    assert (status, out) == (2, "")
    assert "--template-var" in err


def test_what_may_be_repeated_may_be_repeated():
    assert ("export", "--target") in SINGLE_VALUED
    words = ["demo", "--target=x", "--adapter=a", "--adapter=b", "--json", "--json"]
    with cli.commands["plan"].make_context("plan", words) as context:
        assert [path.name for path in context.params["adapters"]] == ["a", "b"]


HOSTILE = "a\x1b[2J\x9b1mb\n\rhint: c\u202ed"


@pytest.mark.parametrize(
    "words",
    [
        ["plan", HOSTILE, "--target", "raspberry-pi-5-8gb"],
        ["plan", "demo", "--target", HOSTILE],
        ["inspect", HOSTILE],
        ["targets", HOSTILE],
        [HOSTILE],  # which click refuses itself
        ["run", "absent", f"--{HOSTILE}"],
    ],
)
def test_no_refusal_acts_on_the_terminal(words, capsys):
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert r"\x1b[2J" in err
    assert err.replace("\n", "").isprintable()
    assert not any(line.startswith("hint: c") for line in err.splitlines())


def test_a_refusal_of_several_lines_keeps_them_and_no_line_of_it_passes_for_another(capsys):
    refusal = ToolchainError("it failed\n  row: 1\nerror: no", hint="a\nb", log="x\n\x1b[1my")
    cli_module.print_refusal(refusal)
    assert capsys.readouterr().err.splitlines() == [
        "error: it failed", "  row: 1", "  error: no", "x", r"\x1b[1my", r"hint: a\nb"
    ]  # fmt: skip


def test_a_refusal_that_quotes_a_file_at_length_is_cut_in_the_middle(capsys):
    cli_module.print_refusal(
        UsageError(f"x = {'y' * 10**6!r}, expected an integer", hint="z" * 10**6)
    )
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: x = 'yyy")
    assert error.endswith("y', expected an integer")
    assert max(map(len, (error, hint))) == 2001


def test_what_a_model_says_keeps_its_lines_and_does_not_act_on_the_terminal(capsys):
    said = ["one\n\ttwo", "\x1b]0;title\x07", "日本語 👩🏽‍🚀"]
    cli_module.print_stream(
        Part(text=text, is_thought=is_thought) for is_thought in (True, False) for text in said
    )
    shown = "one\n\ttwo\\x1b]0;title\\x07日本語 👩🏽‍🚀\n"
    assert capsys.readouterr() == (shown, shown)


@pytest.mark.parametrize(
    ("words", "shown"), [((), "hm, so\n"), (("--no-reasoning",), ""), (("--json",), "")]
)
def test_a_thought_is_printed_apart_from_the_answer(words, shown, tmp_path, monkeypatch, capsys):
    runner = thinking_runner_in(tmp_path)
    monkeypatch.setattr(Runner, "open", lambda *_, **__: runner)
    status, out, err = run(capsys, "run", tmp_path, QUESTION, *words)
    assert (status, err) == (0, shown.replace("hm, so", THOUGHTS[0]))
    said = DIALOGUE[1]["content"]
    if "--json" in words:
        answer = json.loads(out)
        assert (answer["text"], answer["reasoning"]) == (said, THOUGHTS[0])
    else:
        assert out == f"{said}\n"


def test_progress_does_not_act_on_the_terminal(capsys):
    with cli_module.Terminal().track(HOSTILE, 1) as advance:
        advance(1)
    assert capsys.readouterr().err.startswith(r"a\x1b[2J\x9b1mb\n\rhint: c\u202ed: 0.")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize(("no_color", "is_colored"), [(None, True), ("", True), ("1", False)])
def test_no_color_is_respected_at_a_terminal(no_color, is_colored):
    import pty

    leader, follower = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    if no_color is not None:
        environment["NO_COLOR"] = no_color
    subprocess.run(
        [sys.executable, "-m", "edgekit", "targets", "nowhere"],
        stderr=follower, env=environment, check=False, timeout=60,
    )  # fmt: skip
    said = os.read(leader, 10_000)
    os.close(leader)
    os.close(follower)
    assert b"no target named 'nowhere'" in said
    assert (b"\x1b[" in said) == is_colored


def test_sources_that_are_not_installed_know_their_version(tmp_path):
    """Without site-packages there is no metadata of any package to ask."""
    for package in (edgekit, click):
        place = Path(str(package.__file__)).parent
        (tmp_path / place.name).symlink_to(place, target_is_directory=True)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "edgekit", "--version"],
        env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"edgekit, version {edgekit.__version__}\n"


def test_an_unknown_command_or_option_is_a_usage_error(capsys):
    assert run(capsys, "exprot")[0] == 2
    assert run(capsys, "export", "demo", "--taget", "x")[0] == 2


def test_a_misspelt_target_gets_a_suggestion_and_status_2(capsys):
    status, out, err = run(capsys, "export", "demo", "--target", "rasberry-pi-5-8gb")
    assert (status, out) == (2, "")
    assert "no target named 'rasberry-pi-5-8gb'" in err
    assert "raspberry-pi-5-8gb" in err.split("hint:")[1]


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path, capsys):
    status, _, err = run(capsys, "plan", tmp_path, "--target", "raspberry-pi-5-8gb")
    assert status == 2
    assert "it has no config.json" in err


def test_an_unsupported_architecture_names_the_supported_ones(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mamba9"}')
    status, _, err = run(capsys, "plan", tmp_path, "--target", "raspberry-pi-5-8gb")
    assert status == 2
    assert "'mamba9' are not supported" in err
    assert "llama" in err
    assert "qwen2" in err


def test_a_directory_that_is_no_bundle_has_status_6(tmp_path, capsys):
    status, _, err = run(capsys, "run", tmp_path, "hello")
    assert status == 6
    assert "not a bundle" in err


def test_targets_are_listed_and_shown_with_the_origin_of_every_number(capsys):
    _, out, _ = run(capsys, "targets")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert rows["target"].split() == ["target", "memory", "context", "formats", "device"]
    for cell in ("8 GiB  ", "4096 tokens  ", "gguf, onnx, executorch  ", "Raspberry Pi 5, 8 GB"):
        assert cell in rows["raspberry-pi-5-8gb"]
    assert all(" onnx" not in row or not re.search(r"onnx[A-Z]", row) for row in rows.values())
    _, out, _ = run(capsys, "targets", "raspberry-pi-5-8gb")
    assert "8 GiB" in out
    assert "8589934592" not in out
    assert "https://" in out
    assert "policy" in out
    _, out, _ = run(capsys, "targets", "--json")
    assert json.loads(out)["raspberry-pi-5-8gb"] == "Raspberry Pi 5, 8 GB"
    _, out, _ = run(capsys, "targets", "--schema")
    assert json.loads(out)["type"] == "object"


def test_a_target_file_that_is_wrong_leaves_the_list_whole(tmp_path, monkeypatch, capsys):
    (tmp_path / "my-board.toml").write_text('title = "My board"\n')
    monkeypatch.setenv("EDGEKIT_TARGETS", str(tmp_path))
    status, out, _ = run(capsys, "targets")
    assert status == 0
    (row,) = (line for line in out.splitlines() if line.startswith("my-board"))
    assert "is missing" in row
    assert "raspberry-pi-5-8gb" in out


def test_formats_lists_what_quant_may_be(capsys):
    _, out, _ = run(capsys, "formats")
    assert "Q4_K_M" in out
    _, out, _ = run(capsys, "formats", "--json")
    assert "Q8_0" in json.loads(out)["gguf"]


def shell(words, streams):
    return subprocess.run(
        ["sh", "-c", f'exec "$0" {words} {streams}', sys.executable],
        env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error(streams):
    done = shell("-m edgekit targets raspberry-pi-5-8gb", streams)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_does_not_get_the_number_of_a_closed_stream():
    opens = "import os; from edgekit import cli; cli._open_streams(); os._exit(os.open('/', 0))"
    assert shell(f'-c "{opens}"', "<&- >&- 2>&-").returncode == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has it")
def test_what_cannot_be_written_is_said_in_a_sentence():
    done = shell("-m edgekit targets", ">/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: cannot write: {os.strerror(errno.ENOSPC)}",
        "hint: free some space, or write it elsewhere",
    ]
    done = shell("-m edgekit targets nowhere", "2>/dev/full")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("source", "said"),
    [("head -c 9000000 /dev/zero", "has more than 8388608 characters"),
     (r"printf '\377'", "is not text in UTF-8"), ("cat /dev/zero", "has more than 8388608")],
)  # fmt: skip
def test_a_prompt_that_is_endless_or_no_text_is_refused(source, said, tmp_path):
    done = subprocess.run(
        ["sh", "-c", f'{source} | exec "$0" -m edgekit run {tmp_path}', sys.executable],
        env=environment() | {"PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: standard input {said}")


def test_a_report_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"cannot write .*nowhere.*: No such file"):
        write_report(tmp_path / "nowhere" / "report.html", "text")
    with pytest.raises(UsageError, match=r"cannot write .*: Is a directory"):
        write_report(tmp_path, "text")


@pytest.mark.toolchain
def test_export_prints_the_bundle_on_stdout_and_nothing_else(tiny_checkpoint, tmp_path, capsys):
    out_directory = tmp_path / "out"
    status, out, err = run(
        capsys, "export", tiny_checkpoint, "--target", "raspberry-pi-5-8gb", "--quant", "F32",
        "--context", 64, "-o", out_directory,
    )  # fmt: skip
    assert (status, out) == (0, f"{out_directory}\n")
    assert "plan for Raspberry Pi 5" in err


@pytest.mark.toolchain
def test_plan_prints_expected_beside_limit_and_changes_nothing(tiny_checkpoint, capsys):
    before = sorted(tiny_checkpoint.iterdir())
    _, out, _ = run(capsys, "plan", tiny_checkpoint, "--target", "raspberry-pi-5-8gb")
    assert "to download" in out
    assert "exactly" in out
    assert sorted(tiny_checkpoint.iterdir()) == before
    _, out, _ = run(capsys, "plan", tiny_checkpoint, "--target", "raspberry-pi-5-8gb", "--json")
    assert json.loads(out)["layout"]["is_exact"] is True


@pytest.mark.toolchain
def test_run_streams_an_answer_and_json_gives_the_numbers(tiny_bundle, capsys):
    status, out, _ = run(
        capsys, "run", tiny_bundle, "hello", "--max-tokens", 5, "--threads", 1, "--json"
    )
    answer = json.loads(out)
    assert status == 0
    assert answer["answer_tokens"] <= 5
    assert answer["prompt_tokens"] > 0
    _, text, _ = run(capsys, "run", tiny_bundle, "hello", "--max-tokens", 5, "--threads", 1)
    assert text == visible_lines(answer["text"]) + "\n"


@pytest.mark.toolchain
def test_the_same_seed_says_the_same(tiny_bundle, capsys):
    words = ("run", tiny_bundle, "hi", "--max-tokens", 8, "--threads", 1, "--temperature", 1)
    assert run(capsys, *words, "--seed", 7)[1] == run(capsys, *words, "--seed", 7)[1]


@pytest.mark.toolchain
def test_without_a_prompt_standard_input_is_read(tiny_bundle):
    done = subprocess.run(
        [sys.executable, "-m", "edgekit", "run", str(tiny_bundle), "--max-tokens", "4", "--json",
         "--threads", "1"],
        input="hello there\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["prompt_tokens"] > 0


@pytest.mark.toolchain
def test_a_chat_at_a_terminal_remembers_and_ends_at_ctrl_d(tiny_bundle):
    """A real pseudo-terminal, so that edgekit chats instead of reading standard input."""
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "edgekit", "run", str(tiny_bundle), "--max-tokens", "4",
         "--threads", "1"],
        stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.write(leader, b"hello\n/clear\nhello\n\x04")
    out, err = process.communicate(timeout=120)
    os.close(leader)
    os.close(follower)
    assert process.returncode == 0, err
    assert "Ctrl-D leaves" in err
    answers = [line for line in out.replace("> ", "\n").splitlines() if line.strip()]
    assert len(answers) == 2
    assert answers[0] == answers[1]  # it forgot, so it says the same again


def interrupt(process):
    """Press Ctrl-C until it is noticed: between a prompt and the read after it, it may not be."""
    for _ in range(10):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)
            return
    process.kill()


@pytest.mark.toolchain
def test_ctrl_c_at_an_empty_prompt_ends_the_chat_quietly(tiny_bundle):
    import pty

    program = (  # CI may run us with SIGINT ignored
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from edgekit.cli import main; main(sys.argv[1:])"
    )
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program, "run", str(tiny_bundle), "--threads", "1"],
        stdin=follower, stdout=follower, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stderr
        assert b"Ctrl-D leaves" in process.stderr.readline()
        assert process.stderr.read(2) == b"> "
        interrupt(process)
        err = process.stderr.read()
    os.close(leader)
    os.close(follower)
    assert process.returncode == 0, err
    assert b"half-written" not in err
    assert b"interrupted" not in err


@pytest.mark.toolchain
def test_a_changed_byte_is_noticed_before_the_runtime_sees_it(tiny_bundle, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    content = bytearray((copy / "model.gguf").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.gguf").write_bytes(content)
    status, _, err = run(capsys, "run", copy, "hello")
    assert status == 6
    assert "model.gguf is not what was exported" in err


@pytest.mark.toolchain
def test_inspect_tells_what_is_inside(tiny_bundle, capsys):
    _, out, _ = run(capsys, "inspect", tiny_bundle, "--tensors")
    assert "blk.0.attn_q.weight" in out
    assert "proof: ok   logits" in out
    _, out, _ = run(capsys, "inspect", tiny_bundle / "model.gguf", "--json")
    assert json.loads(out)["format"] == "gguf"


@pytest.mark.toolchain
def test_verify_repeats_the_proof(tiny_bundle, tiny_checkpoint, capsys):
    status, out, _ = run(capsys, "verify", tiny_bundle, tiny_checkpoint)
    assert status == 0
    assert "ok   logits" in out


def test_a_missing_extra_names_the_pip_line(tmp_path, capsys, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "torch" else find_spec(name, *rest),
    )
    status, _, err = run(capsys, "export", "demo", "--target", "raspberry-pi-5-8gb")
    assert status == 5
    assert "pip install 'edgekit[gguf]'" in err


def test_a_plan_for_programs_keeps_the_keys_it_was_first_written_with(tmp_path, pi):
    pytest.importorskip("numpy")
    checkpoint = random_checkpoint(tmp_path)
    best = make_plan(checkpoint, pi, Choice(format="gguf")).estimate.artifact_bytes
    tight = replace(pi, budget=replace(pi.budget, artifact_bytes=best - 1))
    made = make_plan(checkpoint, tight, Choice(format="gguf"))
    document = json.loads(json.dumps(cli_module.plain(cli_module.plan_document(made))))
    assert document.keys() == {
        "format", "recipe", "context_tokens", "layout", "estimate", "rejected", "notes",
        "split_bytes", "quant_method",
    }  # fmt: skip
    assert document["recipe"].keys() == {
        "name", "default", "rules", "changes", "max_mean_kl_nats", "min_same_top_token",
        "demo_kl_nats",
    }  # fmt: skip
    assert {key for rule in document["recipe"]["rules"] for key in rule} == {
        "pattern", "storage", "layers", "decoders",
    }  # fmt: skip
    assert {key for placed in document["layout"]["placements"] for key in placed} == {
        "role", "parameters", "storage", "wanted", "size_bytes",
    }  # fmt: skip
    assert {key for candidate in document["rejected"] for key in candidate} == {
        "format", "recipe", "context", "layout", "estimate", "misses", "sure_misses", "refusal",
    }  # fmt: skip


# Signals


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(
    ("name", "is_ignored", "status", "said"),
    [
        ("SIGINT", False, 0, "a piece …\nthe chat goes on\n"),
        ("SIGTERM", False, 143, "a piece"),
        ("SIGHUP", False, 129, "a piece"),
        ("SIGHUP", True, 0, "a piece and another\nthe chat goes on\n"),  # under nohup
    ],
)
def test_a_chat_survives_ctrl_c_and_nothing_else(name, is_ignored, status, said):
    program = textwrap.dedent("""
        import os, signal, sys
        from edgekit import cli
        from edgekit.text.answer import Part

        number, before = getattr(signal, sys.argv[1]), getattr(signal, sys.argv[2])
        signal.signal(number, before)
        class Reply:
            texts = iter(["a piece", " and another"])
            def next_part(self):
                text = next(self.texts, None)
                if text == " and another":
                    os.kill(os.getpid(), number)
                return None if text is None else Part(text=text)
            def close(self):
                pass
        @cli.cli.command("talk")
        def talk():
            cli.say(Reply())
            print("the chat goes on")
        cli.main(["talk"])
    """)
    before = "SIG_IGN" if is_ignored else "default_int_handler" if name == "SIGINT" else "SIG_DFL"
    done = subprocess.run(
        [sys.executable, "-c", program, name, before], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.rstrip("\n")) == (status, said.rstrip("\n")), done.stderr
