"""`tieredlimit check` and `schema`, and what all commands share: usage, errors, start."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import tieredlimit
from tieredlimit.cli import main

SOUND = """
[features.image]
routes = ["POST /v1/images"]
[tiers.everyone]
quotas.image = "5/minute"
"""
COSTLY = SOUND.replace('["POST /v1/images"]', '{ "POST /v1/images" = 8 }')
FAULTY = SOUND.replace("5/minute", "5/month") + 'colour = "red"\n'


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(SOUND, "utf-8")
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def as_json(result: Result) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(result.stdout)
    return document


# --- Sound policies


def test_sound_policy_gets_one_line(policy: Path) -> None:
    result = run("check", policy)

    assert result.exit_code == 0
    assert result.stdout == f"{policy}: ok · 1 tier x 1 feature, 1 quota, 1 route\n"


def test_warning_has_its_place_and_does_not_fail(policy: Path) -> None:
    policy.write_text(COSTLY, "utf-8")

    result = run("check", policy)

    warning, summary = result.stdout.splitlines()
    assert result.exit_code == 0
    assert warning.startswith("warning: tiers.everyone.quotas.image: ")
    assert summary.endswith("ok · 1 tier x 1 feature, 1 quota, 1 route · 1 warning")


def test_strict_makes_a_warning_fail(policy: Path) -> None:
    policy.write_text(COSTLY, "utf-8")

    result = run("check", "--strict", policy)

    assert result.exit_code == 1
    assert ": not ok · " in result.stdout
    assert result.stdout.endswith("1 warning, and --strict allows none\n")


def test_strict_passes_a_policy_without_warnings(policy: Path) -> None:
    result = run("check", "--strict", policy)

    assert result.exit_code == 0
    assert ": ok · " in result.stdout


def test_several_paths_are_overlays(policy: Path, tmp_path: Path) -> None:
    above = tmp_path / "prod.toml"
    above.write_text('[tiers.everyone]\nquotas.image = ["5/minute", "50/day"]\n', "utf-8")

    result = run("check", policy, above)

    assert result.stdout == f"{policy} + {above}: ok · 1 tier x 1 feature, 2 quotas, 1 route\n"


@pytest.mark.parametrize(("strict", "ok"), [((), True), (("--strict",), False)])
def test_json_counts_and_lists_warnings(policy: Path, strict: tuple[str, ...], ok: bool) -> None:
    policy.write_text(COSTLY, "utf-8")

    document = as_json(run("check", "--json", *strict, policy))

    (warning,) = document.pop("warnings")
    assert warning["path"] == "tiers.everyone.quotas.image"
    assert document == {
        "policy": [str(policy)],
        "ok": ok,
        "faults": [],
        "tiers": 1,
        "features": 1,
        "quotas": 1,
        "routes": 1,
        "pools": 0,
    }


# --- Faults


def test_every_fault_is_a_line_with_its_place(policy: Path) -> None:
    policy.write_text(FAULTY, "utf-8")

    result = run("check", policy)

    *faults, summary = result.stdout.splitlines()
    assert result.exit_code == 1
    assert sorted(line.split(": ")[1] for line in faults) == [
        "tiers.everyone.colour",
        "tiers.everyone.quotas.image",
    ]
    assert all(line.startswith("fault: ") for line in faults)
    assert summary == f"{policy}: 2 faults"


def test_json_lists_faults(policy: Path) -> None:
    policy.write_text(FAULTY, "utf-8")

    result = run("check", "--json", policy)

    document = as_json(result)
    assert result.exit_code == 1
    assert not document["ok"]
    assert len(document["faults"]) == 2


def test_fault_of_a_whole_file_is_one_line(tmp_path: Path) -> None:
    result = run("check", tmp_path / "nope.toml")

    assert result.exit_code == 1
    assert result.stdout == f"{tmp_path}/nope.toml: cannot be read: No such file or directory\n"


def test_text_of_a_policy_cannot_steer_the_terminal(policy: Path) -> None:
    policy.write_text(SOUND + '"\\u001b[2J\\n\\u202e" = 1\n', "utf-8")

    result = run("check", policy)

    fault, _ = result.stdout.splitlines()
    assert result.stdout.replace("\n", "").isprintable()
    assert "\\u202e" in fault


@pytest.mark.parametrize("command", [["table"], ["explain", "--feature", "image"]])
def test_other_commands_tell_faults_on_standard_error(policy: Path, command: list[str]) -> None:
    policy.write_text(FAULTY, "utf-8")

    result = run(*command, policy)

    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.endswith(f"{policy}: 2 faults\n")


@pytest.mark.parametrize("content", [b"x = ", b"\xff", b"[" * 100_000])
def test_unreadable_policy_is_one_line(policy: Path, content: bytes) -> None:
    policy.write_bytes(content)

    result = run("table", policy)

    assert result.exit_code == 1
    assert result.stderr.startswith(f"{policy}: ")
    assert result.stderr.count("\n") == 1


# --- Usage


@pytest.mark.parametrize(
    "words", [["check"], ["chek"], ["check", "--stict", "x"], ["table"], ["explain"]]
)
def test_wrong_usage_is_2_and_no_traceback(words: list[str]) -> None:
    result = run(*words)

    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "Error: " in result.stderr


def test_misspelt_option_gets_a_hint() -> None:
    assert "--strict" in run("check", "--stict", "x").stderr


def test_version_is_the_package_s() -> None:
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8"))

    assert run("--version").stdout.split()[-1] == tieredlimit.__version__
    assert tieredlimit.__version__ == project["project"]["version"]


def test_schema_is_json() -> None:
    assert isinstance(json.loads(run("schema").stdout), dict)


def test_schema_path_is_where_it_is_installed() -> None:
    path = Path(run("schema", "--path").stdout.rstrip("\n"))

    assert json.loads(path.read_text("utf-8")) == json.loads(run("schema").stdout)


def test_command_writes_to_any_stream(policy: Path) -> None:
    with redirect_stdout(StringIO()) as written, pytest.raises(SystemExit):
        main(["check", str(policy)])

    assert ": ok · " in written.getvalue()


# --- Processes of their own


def test_package_does_not_load_click() -> None:
    code = "import sys, tieredlimit; sys.exit('click' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("start", [["-m", "tieredlimit"], [Path(sys.prefix, "bin", "tieredlimit")]])
def test_command_runs_as_a_process_without_colours(start: list[object], policy: Path) -> None:
    if isinstance(start[0], Path) and not start[0].exists():
        pytest.skip("the package is not installed here")
    words = [sys.executable, *map(str, start), "check", str(policy)]

    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{policy}: ok · 1 tier x 1 feature, 1 quota, 1 route\n"


def test_output_survives_a_terminal_of_another_encoding(policy: Path) -> None:
    message = '[tiers.everyone.messages]\nimage = "Dość na dziś: 画像"\n'
    policy.write_text(SOUND.replace('"5/minute"', "0") + message, "utf-8")
    words = [sys.executable, "-m", "tieredlimit", "explain", str(policy), "--feature", "image"]

    done = subprocess.run(
        words, capture_output=True, env={"PYTHONIOENCODING": "latin-1"}, check=False
    )

    assert done.returncode == 0
    assert b"Do\\u015b\\u0107" in done.stdout
