"""The command line itself: finding commands, global options, errors, exit codes, start-up time."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest

from ruvllm_cli.hooks import commands
from ruvllm_core import __version__
from ruvllm_core.cli.main import cli

HELLO = """
    import click

    @hookimpl
    def commands():
        return [Offer("hello", "{module}:hello", "says hello")]

    @click.command("hello")
    @click.pass_obj
    def hello(app):
        click.echo(f"{who} " + app.settings.model)
"""


def hello(distribution: str) -> str:
    return HELLO.format(module=distribution.replace("-", "_") + "_hooks", who=distribution)


def python(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60, **options)


def test_help_lists_every_command_with_its_summary(ruvllm) -> None:
    result = ruvllm("--help")
    assert result.code == 0
    listed = {line.split()[0]: line for line in result.out.split("Commands:")[1].splitlines() if line.strip()}
    for offer in commands():
        assert offer.summary in listed[offer.name]


QUICK = [["--help"], ["plugins", "--json"], ["run", "--help"], ["--version"]]


@pytest.mark.parametrize("args", QUICK)
def test_imports_nothing_heavy(args: list[str]) -> None:
    result = python("-X", "importtime", "-m", "ruvllm_core.cli.main", *args)
    assert result.returncode == 0, result.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"torch", "transformers", "tokenizers", "huggingface_hub", "jinja2"}


@pytest.mark.parametrize("args", QUICK)
def test_starts_within_half_a_second(args: list[str]) -> None:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(3):
        # Processor time: that of one thread, and unlike the time on the clock not that of others on a busy machine.
        before = spent()
        assert python("-m", "ruvllm_core.cli.main", *args).returncode == 0
        times.append(spent() - before)
    assert min(times) < 0.5


def test_discovery_of_doctor_imports_no_torch() -> None:
    result = python("-X", "importtime", "-m", "ruvllm_core.cli.main", "doctor", "--no-gpu", "--json")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "psutil" in imported
    assert "torch" not in imported
    assert json.loads(result.stdout)["gpu"] is None


def test_help_imports_no_command(install, ruvllm) -> None:
    install(
        "dist-lazy",
        "lazy",
        """
        @hookimpl
        def commands():
            return [Offer("lazy", "no_such_module:command", "cannot be imported")]
        """,
    )
    assert "cannot be imported" in ruvllm("--help").out
    assert ruvllm("--version").out == f"ruvllm {__version__}\n"
    ruvllm("lazy").failed(1, "'lazy' of dist-lazy 1.2.3", "no_such_module", "plugin_block")


def test_a_third_party_command_runs_like_a_built_in_one(install, ruvllm, tmp_path: Path) -> None:
    install("dist-hello", "hello", hello("dist-hello"))
    config = tmp_path / "c.toml"
    config.write_text('model = "from-file"')
    assert ruvllm("hello").out == "dist-hello smollm2\n"
    assert ruvllm("--config", config, "hello").out == "dist-hello from-file\n"
    assert ruvllm("hello", "--config", config).out == "dist-hello from-file\n"
    assert ruvllm("hello", f"--config={config}").out == "dist-hello from-file\n"
    assert "--log-level" in ruvllm("hello", "--help").out


def test_two_plugins_with_one_command_fail_only_for_it(install, ruvllm, tmp_path: Path) -> None:
    install("dist-one", "one", hello("dist-one"))
    install("dist-two", "two", hello("dist-two"))
    ruvllm("hello").failed(1, "'hello' is claimed by", "dist-one", "dist-two", "plugin_block")
    assert ruvllm("plugins").code == 0
    config = tmp_path / "block.toml"
    config.write_text('plugin_block = ["two"]')
    assert ruvllm("hello", "--config", config).out == "dist-one smollm2\n"


def test_a_broken_plugin_breaks_nothing_else(install, ruvllm) -> None:
    install("dist-broken", "broken", "raise RuntimeError('it is broken')")
    assert ruvllm("--help").code == 0
    row = next(row for row in ruvllm("plugins", "--json").json["plugins"] if row["name"] == "broken")
    assert (row["status"], row["distribution"]) == ("quarantined", "dist-broken")
    assert "it is broken" in row["reason"]
    ruvllm("broken").failed(1, "plugin broken is broken", "it is broken")
    ruvllm("serv").failed(2, "no command 'serv'", "broken (RuntimeError: it is broken)")


def test_what_is_no_click_command_is_an_error(install, ruvllm) -> None:
    install("dist-odd", "odd", "@hookimpl\ndef commands(): return [Offer('odd', 'json:dumps')]")
    ruvllm("odd").failed(1, "'odd' is no click command")


def test_unknown_names_are_usage_errors_that_name_the_nearest(ruvllm) -> None:
    ruvllm("toknize").failed(2, "no command 'toknize'", "did you mean tokenize")
    ruvllm("plugins", "--jsn").failed(2, "--json")
    ruvllm("--log-level", "loud", "plugins").failed(2, "loud")


@pytest.mark.parametrize("order", [0, 1])
def test_wrong_settings_name_file_key_and_remedy(ruvllm, tmp_path: Path, order: int) -> None:
    config = tmp_path / "c.toml"

    def call(text: str | bytes) -> object:
        config.write_bytes(text.encode() if isinstance(text, str) else text)
        args = ["--config", str(config)]
        return ruvllm(*args, "plugins") if order else ruvllm("plugins", *args)

    call('backnd = "candle"').failed(1, str(config), "backnd", "did you mean backend")
    call("[sampling]\ntemprature = 1").failed(1, str(config), "sampling.temprature", "did you mean temperature")
    call("threads = -1").failed(1, str(config), "threads")
    call("threads = ").failed(1, str(config), "TOML")
    call(b"model = '\xff'").failed(1, str(config), "TOML")
    config.unlink()
    ruvllm("plugins", "--config", config).failed(1, str(config), "No such file")
    ruvllm("plugins", "--config", tmp_path).failed(1, str(tmp_path), "directory")


def test_wrong_environment(ruvllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUVLLM_BACKND", "candle")
    ruvllm("plugins").failed(1, "RUVLLM_BACKND", "did you mean RUVLLM_BACKEND")
    result = ruvllm("--help")
    assert result.code == 0
    assert "settings are wrong" in result.out


def test_settings_of_a_plugin_that_is_not_there(ruvllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUVLLM_PLUGINS__NOBODY__KEY", "1")
    report = ruvllm("doctor", "--no-gpu", "--json")
    assert report.code == 1
    assert any("nobody" in problem for problem in json.loads(report.out)["problems"])


@pytest.mark.parametrize("error", ["RuntimeError('it came unexpected')", "KeyError('it came unexpected')"])
def test_unexpected_errors_show_a_traceback_only_with_debug(install, ruvllm, error: str) -> None:
    install("dist-hello", "hello", hello("dist-hello").replace("click.echo(", f"raise {error}; click.echo("))
    ruvllm("hello").failed(1, "error: unexpected", "it came unexpected", "--debug")
    for args in (["--debug", "hello"], ["hello", "--debug"]):
        assert "Traceback" in ruvllm(*args).err


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "click.Abort"])
def test_an_interrupt_is_130(install, ruvllm, error: str) -> None:
    install("dist-hello", "hello", hello("dist-hello").replace("click.echo(", f"raise {error}; click.echo("))
    ruvllm("hello").failed(130)


def test_what_a_command_returns_is_no_exit_code(install, ruvllm) -> None:
    install("dist-hello", "hello", hello("dist-hello").replace("click.echo(", "return 7; click.echo("))
    assert ruvllm("hello").code == 0


def test_a_closed_pipe_is_no_reason_to_complain() -> None:
    code = "import sys, subprocess; sys.exit(0)"
    reader = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    reader.wait()
    result = subprocess.run(
        [sys.executable, "-m", "ruvllm_core.cli.main", "plugins", "--json"],
        stdout=reader.stdin,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    assert reader.stdin is not None
    with pytest.raises(BrokenPipeError):
        reader.stdin.write(b"x")
        reader.stdin.flush()
    assert (result.returncode, result.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_an_error_without_traceback() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "ruvllm_core.cli.main", "plugins", "--json"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr == "error: OSError: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(("status", "code", "err"), [("'sorry'", 1, "sorry\n"), ("3", 3, ""), ("", 0, "")])
def test_a_command_may_exit(install, ruvllm, status: str, code: int, err: str) -> None:
    install(
        "dist-hello", "hello", hello("dist-hello").replace("click.echo(", f"raise SystemExit({status}); click.echo(")
    )
    result = ruvllm("hello")
    assert (result.code, result.out, result.err) == (code, "", err)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(ruvllm, shell: str) -> None:
    assert "_RUVLLM_COMPLETE" in ruvllm("completion", shell).out


def test_completion_completes_commands_and_options(install, ruvllm, monkeypatch: pytest.MonkeyPatch) -> None:
    install("dist-lazy", "lazy", "@hookimpl\ndef commands(): return [Offer('doolittle', 'no_such:command', 'lazy')]")
    monkeypatch.setenv("_RUVLLM_COMPLETE", "bash_complete")

    def complete(line: str) -> set[str]:
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        return {row.partition(",")[2] for row in ruvllm().out.splitlines()}

    assert complete("ruvllm do") == {"doctor", "doolittle"}
    assert {"--temperature", "--config"} <= complete("ruvllm run --")


def test_plugins_reports_offers_and_selection(ruvllm) -> None:
    report = ruvllm("plugins", "--json").json
    row = next(row for row in report["plugins"] if (row["kind"], row["name"]) == ("kernels", "torch"))
    assert (row["distribution"], row["version"], row["status"], row["reason"]) == (
        *("ruvllm-core", __version__, "ok", None),
    )
    assert report["selected"]["cache_policies"]["selected"] == ["contiguous"]
    text = ruvllm("plugins").out
    assert "torch" in text
    assert "Selected here" in text


def test_selection_names_winner_and_losers(install, ruvllm, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        "dist-fast",
        "fast",
        """
        @hookimpl
        def kernels():
            return [
                Offer("fastest", "a:b", probe=lambda: "no such device", priority=99),
                Offer("fast", "a:b", priority=98),
            ]

        @hookimpl
        def learning_loops():
            return [Offer("learner", "a:b"), Offer("dreamer", "a:b", probe=lambda: "it sleeps")]
        """,
    )
    selected = ruvllm("plugins", "--json").json["selected"]
    assert selected["kernels"]["selected"] == ["fast"]
    lost = {one["name"]: one["reason"] for one in selected["kernels"]["lost"]}
    assert lost["fastest"] == "no such device"
    assert lost["torch"] == "fast comes first"
    assert [name for name in selected["learning_loops"]["selected"] if name != "sona"] == ["learner"]
    assert selected["learning_loops"]["lost"] == [{"name": "dreamer", "reason": "it sleeps"}]
    monkeypatch.setenv("RUVLLM_KERNELS", "fastest,torch")
    monkeypatch.setenv("RUVLLM_CACHE__POLICY", "pagd")
    selected = ruvllm("plugins", "--json").json["selected"]
    assert selected["kernels"]["selected"] == ["torch"]
    assert {"name": "fast", "reason": "not asked for"} in selected["kernels"]["lost"]
    assert "no 'pagd'" in selected["cache_policies"]["error"]
    monkeypatch.setenv("RUVLLM_LEARNING", "dreamer")
    learning = ruvllm("plugins", "--json").json["selected"]["learning_loops"]
    assert learning["selected"] == []
    assert {"name": "learner", "reason": "not asked for"} in learning["lost"]
    assert "dreamer: it sleeps" in learning["error"]
    report = ruvllm("doctor", "--no-gpu", "--json")
    assert report.code == 1
    assert any("no 'pagd'" in problem for problem in json.loads(report.out)["problems"])


def test_doctor_describes_this_machine(candle, ruvllm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import psutil
    import torch

    config = tmp_path / "c.toml"
    config.write_text("threads = 2")
    monkeypatch.setenv("RUVLLM_OFFLINE", "true")
    report = ruvllm("doctor", "--json", "--config", config, "--log-level", "error").json
    assert report["problems"] == []
    assert report["packages"]["torch"] == version("torch")
    assert report["cpu"]["logical_cores"] == os.cpu_count()
    assert report["memory"]["total_bytes"] == psutil.virtual_memory().total
    assert len(report["gpu"]["devices"]) == torch.cuda.device_count() + int(torch.backends.mps.is_available())
    assert report["cache_dir"]["path"] == str(tmp_path / "cache")
    assert report["selected"]["backends"]["selected"] == ["candle"]
    sources = {one["name"]: one["source"] for one in report["settings"]}
    assert sources["threads"] == str(config)
    assert sources["offline"] == "environment"
    assert sources["log_level"] == "flag"
    assert sources["dtype"] == "default"
    assert not (tmp_path / "cache").exists()


def test_the_group_is_what_click_expects() -> None:
    context = click.Context(cli)
    assert {"run", "chat", "pull", "list", "rm", "doctor", "bench", "perplexity"} <= set(cli.list_commands(context))
