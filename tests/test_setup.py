"""`make run` and `make test` on a bare machine: who installs what, or which line is printed.

The Makefile and `.ci/setup` are real; so is every tool but those that tell the machines apart: who
is root, what is there, what apt-get, conda, uv and pip answer. Those write their calls down.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvttl.bench import sliders

ROOT = Path(__file__).resolve().parents[1]
REAL = "bash sh make dirname basename tail rm mktemp cat touch env mkdir cp chmod".split()
ALL = ("redis-server", "openssl", "chromium", "libnuma1")
APT = "sudo apt-get update && sudo apt-get install -y --no-install-recommends "
INSTALL = "apt-get install -y -q -o DPkg::Lock::Timeout=300 --no-install-recommends "

# Each package is a program of its name in bin/; libnuma1 is asked of Python, or of ldconfig.
FAKES = {
    "id": 'echo "$FAKE_UID"',
    "ldconfig": '[ ! -e "$BIN/libnuma1" ] || echo "libnuma.so.1 => /lib/libnuma.so.1"',
    "apt-cache": 'case " $IN_APT " in *" $2 "*) ;; *) exit 100;; esac',
    "apt-get": """[ -z "$APT_FAILS" ] || { echo "E: no network"; exit 100; }
[ "$1" = update ] || for package in "$@"; do
case $package in install | -*) ;; *) cp "$BIN/true" "$BIN/$package";; esac; done""",
    "service": '[ "$2" != status ] || [ "$REDIS_RAN" ]',
    "update-rc.d": ":",
    "grep": f'case "$*" in *os-release) [ "$UBUNTU" ];; *) exec {shutil.which("grep")} "$@";; esac',
}
SUDO = '[ "$1" = -n ] && shift && exec "$@"'
# `python -m venv`, `uv venv` and `conda create -p` end in the same: an environment with pip.
PIP = """case "$*" in
*"import pip"*) exit 0;;
*libnuma.so.1*) [ -e "$BIN/libnuma1" ];;
*torch==*extra-index*) exit 0;;
*torch==*) [ -z "$NO_CPU_TORCH" ] || { echo "no matching torch"; exit 1; };;
*"-r requirements.txt"*) echo "Looking in links"
    [ ! -e "$BIN/offline" ] || { echo "no route"; exit 1; };;
esac"""
VENV = 'mkdir -p .venv/bin; cp "$BIN/pip-python" .venv/bin/python'
PYTHON = f"""case "$*" in
"-m venv .venv") {VENV};;
*ensurepip*) [ -z "$NO_ENSUREPIP" ];;
*libnuma.so.1*) [ -e "$BIN/libnuma1" ];;
esac"""
BROKEN_SHIM = 'echo "pyenv: python3.11: command not found" >&2; exit 127'


class Machine:
    """A fresh clone and a PATH that holds what the machine has, and nothing else."""

    def __init__(self, folder):
        self.clone, self.bin, self.log = folder / "clone", folder / "bin", folder / "calls"
        for path in (self.clone / ".ci", self.bin):
            path.mkdir(parents=True)
        self.log.touch()
        for name in ("Makefile", ".ci/setup", "pyproject.toml", "requirements.txt"):
            shutil.copy(ROOT / name, self.clone / name)
        shutil.copy(ROOT / "requirements-agents.txt", self.clone)
        for name in REAL:
            (self.bin / name).symlink_to(shutil.which(name))
        self.add(**FAKES, **{"true": ":", "pip-python": PIP})

    def add(self, *present, **fakes):
        """Programs that only succeed, and others with a body; all write down their calls."""
        for name, body in {**dict.fromkeys(present, ":"), **fakes}.items():
            path = self.bin / name
            path.write_text(f'#!/bin/sh\necho "${{0##*/}} $*" >>"$CALLS"\n{body}\n')
            path.chmod(0o755)
        return self

    def make(self, *arguments, uid=1000, **env):
        fixed = {"PATH": self.bin, "BIN": self.bin, "CALLS": self.log, "FAKE_UID": uid}
        fixed |= {"IN_APT": "python3.11-venv", "HOME": self.clone}
        return subprocess.run(
            ["make", "--no-print-directory", *arguments],
            cwd=self.clone,
            env={name: str(value) for name, value in (fixed | env).items()},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, *programs):
        """What was called, of these programs only if any is named."""
        lines = self.log.read_text().splitlines()
        return [line for line in lines if not programs or line.split()[0] in programs]

    def changes(self):
        """The calls that change the machine."""
        return self.calls("apt-get", "update-rc.d", "conda", "uv", "python", "python3.11")


@pytest.fixture
def machine(tmp_path):
    """A Debian machine with Python 3.11 and nothing else that the kit needs."""
    return Machine(tmp_path).add(**{"python3.11": PYTHON})


def is_done(machine):
    return (machine.clone / ".venv/.installed-agents").exists()


# --- without root: one message, before anything else ----------------------------------------


def test_without_root_one_message_has_the_line_to_type_and_nothing_is_done(machine):
    done = machine.make("test")
    assert done.returncode and done.stdout == ""
    missing = "chromium libnuma1 openssl redis-server"
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"Missing: {missing}. ")
    assert lines[1].strip() == APT + missing
    assert lines[2] == "Any Chrome does for chromium: KV_CHROMIUM=/path/to/chrome"
    assert lines[3].startswith("make: ***") and len(lines) == 4
    assert not (machine.clone / ".venv").exists()
    assert all(" -c " in call for call in machine.changes()), machine.changes()


@pytest.mark.parametrize("target", ["run", "serve", "notebooks"])
def test_an_engine_needs_no_redis_server_and_no_browser(machine, target):
    assert machine.make(target).stderr.splitlines()[1].strip() == APT + "libnuma1"


def test_targets_without_an_engine_need_nothing_but_python(machine):
    assert machine.make("install").returncode == 0
    assert machine.calls("apt-get", "sudo") == []


def test_ubuntu_has_chromium_under_another_name(machine):
    machine.add("redis-server", "openssl", "libnuma1")
    done = machine.make("test", UBUNTU=1)
    assert done.stderr.splitlines()[1].strip() == APT + "chromium-browser"


def test_without_apt_get_the_message_names_what_to_install(machine):
    for name in ("apt-get", "apt-cache"):
        (machine.bin / name).unlink()
    done = machine.make("test", uid=0)
    wanted = "Install with this system's package manager: chromium libnuma1 openssl redis-server"
    assert done.returncode and wanted in done.stderr.splitlines()


@pytest.fixture
def conda(machine, tmp_path):
    """An active conda environment with a Python 3.11, first on the PATH."""
    env = tmp_path / "env/bin"
    env.mkdir(parents=True)
    shutil.move(machine.bin / "python3.11", env)
    machine.add("conda")
    return {"PATH": f"{env}:{machine.bin}", "CONDA_PREFIX": env.parent}


def test_in_a_conda_environment_the_line_is_condas(machine, conda):
    lines = [line.strip() for line in machine.make("test", **conda).stderr.splitlines()]
    assert lines[1] == "conda install -y -c conda-forge libnuma openssl redis-server"
    assert lines[2] == APT + "chromium"  # not on conda-forge
    assert machine.calls("conda") == []


def test_the_systems_python_needs_the_systems_libnuma(machine, tmp_path):
    """It does not look into the folders of conda's environment."""
    machine.add("conda")
    done = machine.make("run", CONDA_PREFIX=tmp_path / "env")
    assert done.stderr.splitlines()[1].strip() == APT + "libnuma1"


# --- with root ------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [(), ("openssl",), ("openssl", "chromium", "libnuma1")])
def test_root_installs_exactly_what_is_missing(machine, there):
    machine.add(*there)
    done = machine.make("test", uid=0)
    missing = " ".join(sorted(set(ALL) - set(there)))
    assert machine.calls("apt-get") == ["apt-get update -q", INSTALL + missing]
    assert is_done(machine), done.stderr
    assert done.stdout.splitlines()[0].startswith(f"Installing {missing} with apt-get")


def test_nothing_is_installed_twice(machine):
    machine.add(*ALL)
    machine.make("test", uid=0)
    assert machine.calls("apt-get", "service") == []
    before = len(machine.changes())
    done = machine.make("test", uid=0)
    assert done.stdout == "" and done.returncode == 0
    later = [call for call in machine.changes()[before:] if " -c " not in call]  # only questions
    assert later == ["python -m pytest"]


def test_sudo_without_a_password_will_do(machine):
    done = machine.add(sudo=SUDO).make("test")
    missing = "chromium libnuma1 openssl redis-server"
    asked = machine.calls("sudo")
    assert asked[:2] == ["sudo -n true", "sudo -n apt-get update -q"]
    assert f"sudo -n env DEBIAN_FRONTEND=noninteractive {INSTALL}{missing}" in asked
    assert is_done(machine), done.stderr


def test_a_sudo_that_asks_for_a_password_is_not_used(machine):
    machine.add(sudo='[ "$1" != -n ]')
    assert APT in machine.make("test").stderr
    assert machine.calls("sudo", "apt-get") == ["sudo -n true"]


def test_what_apt_get_says_is_shown_only_if_it_fails(machine):
    done = machine.make("test", uid=0, APT_FAILS=1)
    assert done.returncode and "E: no network" in done.stderr
    assert "This failed: apt-get update -q" in done.stderr
    assert not (machine.clone / ".venv").exists()


def test_a_package_that_brings_no_working_program_is_named(machine):
    """Ubuntu's chromium-browser in a container: a program that asks for a snap."""
    machine.add(**{"true": "exit 1"})  # what the installed programs then do
    done = machine.make("bench-sliders", uid=0)
    assert done.returncode and "Missing: chromium. " in done.stderr
    assert "KV_CHROMIUM=/path/to/chrome" in done.stderr
    assert not (machine.clone / ".venv").exists()


STOP = ["service redis-server stop", "update-rc.d redis-server disable"]


@pytest.mark.parametrize(
    ("there", "ran", "stopped"),
    [((), "", STOP), ((), "yes", []), (("redis-server",), "yes", []), (("redis-server",), "", [])],
)
def test_only_the_redis_that_our_install_started_is_stopped(machine, there, ran, stopped):
    machine.add(*there)
    machine.make("test", uid=0, REDIS_RAN=ran)
    assert machine.calls("apt-get")
    called = machine.calls("service", "update-rc.d")
    assert [call for call in called if call != "service redis-server status"] == stopped


# --- Python ---------------------------------------------------------------------------------


@pytest.fixture
def no_python(tmp_path):
    """A machine with all but Python 3.11: what a pyenv leaves on the PATH does not run."""
    return Machine(tmp_path).add(*ALL, **{"python3.11": BROKEN_SHIM})


UV = "uv venv --seed --allow-existing --python 3.11 .venv"


def test_uv_brings_a_missing_python(no_python):
    done = no_python.add(uv=VENV).make("install")
    assert no_python.calls("uv") == [UV]
    assert "Python 3.11 comes from uv" in done.stdout and done.returncode == 0


def test_conda_brings_a_missing_python_and_its_libnuma(no_python):
    (no_python.bin / "libnuma1").unlink()
    done = no_python.add(conda=VENV).make("run")
    (call,) = no_python.calls("conda")
    assert call == (
        f"conda create -y -p {no_python.clone}/.venv --override-channels -c conda-forge"
        " python=3.11 pip libnuma"
    )
    assert "Python 3.11 comes from conda" in done.stdout and "Installed in" in done.stdout


def test_a_python_without_ensurepip_is_as_good_as_none(no_python):
    no_python.add(uv=VENV, **{"python3.11": PYTHON}).make("install", NO_ENSUREPIP=1)
    assert no_python.calls("uv") == [UV]


def test_a_python_that_is_there_is_used_before_conda_and_uv(machine):
    assert machine.add(uv=VENV, conda=VENV).make("install").returncode == 0
    assert machine.calls("uv", "conda") == []
    assert "python3.11 -m venv .venv" in machine.calls("python3.11")


def test_apt_get_brings_python_where_it_has_it(no_python):
    done = no_python.make("install")
    assert done.stderr.splitlines()[1].strip() == APT + "python3.11-venv"
    no_python.make("install", uid=0)
    assert no_python.calls("apt-get") == ["apt-get update -q", INSTALL + "python3.11-venv"]


@pytest.mark.parametrize("uid", [0, 1000])
def test_where_nothing_brings_python_the_message_says_how_to_get_it(no_python, uid):
    done = no_python.make("test", uid=uid, IN_APT="")
    assert done.returncode and "astral.sh/uv/install.sh" in done.stderr
    assert "PYTHON=/path/to/python3.11" in done.stderr
    assert [call for call in no_python.calls("apt-get") if "install" in call] == []


def test_a_named_python_of_another_version_is_refused_by_its_name(machine):
    machine.add(python3="exit 1", uv=VENV, **{"python3.11": PYTHON})
    done = machine.make("test", "PYTHON=python3", uid=0)
    assert "PYTHON=python3 is not a Python 3.11" in done.stderr
    assert machine.calls("apt-get", "uv") == []


# --- pip ------------------------------------------------------------------------------------


def test_pip_is_quiet_unless_it_fails_and_an_install_that_failed_goes_on(machine):
    (machine.bin / "offline").touch()
    failed = machine.make("install")
    assert failed.returncode and "no route" in failed.stderr
    assert not (machine.clone / ".venv/.installed").exists()
    (machine.bin / "offline").unlink()
    done = machine.make("install")
    assert done.returncode == 0 and done.stderr == ""
    first, last = done.stdout.splitlines()
    assert "requirements.txt into .venv (about 4 GB" in first and last.startswith("Installed in")
    assert machine.calls("python3.11").count("python3.11 -m venv .venv") == 1


@pytest.mark.parametrize("none", ["", "1"])
def test_pytorchs_own_index_is_asked_only_where_there_is_no_cpu_build(machine, none):
    done = machine.make("install", NO_CPU_TORCH=none)
    asked = [call for call in machine.calls("python") if "--extra-index-url" in call]
    assert done.returncode == 0 and done.stderr == ""
    assert len(asked) == bool(none)


# --- the browser ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sliders._BROWSERS)
def test_any_name_of_chrome_will_do(machine, name, monkeypatch):
    machine.add(*set(ALL) - {"chromium"}, name).make("test")
    assert is_done(machine)
    monkeypatch.setenv("PATH", str(machine.bin))
    monkeypatch.delenv("KV_CHROMIUM", raising=False)
    assert Path(sliders._browser_path()).name == name


def test_a_browser_can_be_named(machine, monkeypatch):
    mine = str(machine.add("my-chrome").bin / "my-chrome")
    monkeypatch.setenv("KV_CHROMIUM", mine)
    assert sliders._browser_path() == mine
    assert machine.make("bench-sliders", f"KV_CHROMIUM={mine}").returncode == 0


def test_a_named_browser_that_is_not_there_is_an_error_with_its_name(monkeypatch):
    monkeypatch.setenv("KV_CHROMIUM", "no-such-browser")
    with pytest.raises(RuntimeError, match="no KV_CHROMIUM=no-such-browser"):
        sliders._browser_path()
