"""A command ends without tearing down its interpreter, and loses no output, exit code or exit handler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
import bigincubate.__main__ as program
class Object:
    def __del__(self):
        print("object removed", flush=True)
import atexit, threading, time
cycle = []
cycle += [cycle, Object()]  # only the garbage collector removes them
atexit.register(print, "handler of Python")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread has ended"))).start()
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
sys.argv[1:] = {arguments}
{change}
program.main()
"""
C_HANDLER = """
import ctypes
handler = ctypes.CFUNCTYPE(None)(lambda: print("handler of C", flush=True))
ctypes.CDLL(None).__cxa_atexit(handler, None, None)
"""
FREEZE = "program.interpreter_exit.freeze_objects()"
FAILING = "import bigincubate.cli; bigincubate.cli.main = lambda: {}['missing']"


@pytest.mark.parametrize(
    ("arguments", "change", "code", "says"),
    [
        (["--version"], C_HANDLER, 0, "bigincubate "),
        (["no-such-command"], C_HANDLER, 2, "no-such-command"),
        ([], FAILING, 1, "KeyError: 'missing'"),
        ([], f"{FREEZE}; {FAILING}", 1, "KeyError: 'missing'"),
    ],
)
def test_command_ends_with_its_output_code_and_handlers(
    arguments: list[str], change: str, code: int, says: str
) -> None:
    text = CODE.replace("{arguments}", repr(arguments)).replace("{change}", change)
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=50)
    assert ended.returncode == code, ended.stderr
    assert says in ended.stdout + ended.stderr
    for part in ("thread has ended", "handler of Python"):
        assert part in ended.stdout
    assert ("object removed" in ended.stdout) == (code == 1)  # an unexpected error ends the interpreter as usual
    if code != 1:
        assert "handler of C" in ended.stdout


@pytest.mark.parametrize("library", [False, True])
def test_forked_process_skips_exit_handlers_of_c_unless_a_library_was_added(library: bool) -> None:
    buffered = "import ctypes; ctypes.CDLL(None).printf(b'buffered by C')"
    change = f"program.interpreter_exit.is_forked = True; {buffered}\n{C_HANDLER}"
    text = CODE.replace("{arguments}", "['--version']").replace("{change}", change)
    variables = {**os.environ, "HSA_TOOLS_LIB": "libtool.so" if library else ""}
    command = [sys.executable, "-c", text]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=50)
    for part in ("bigincubate ", "thread has ended", "handler of Python", "buffered by C"):
        assert part in ended.stdout
    assert ("handler of C" in ended.stdout) == library


@pytest.mark.parametrize("freeze", ["pass", FREEZE])
def test_file_that_is_still_open_is_flushed(freeze: str, tmp_path: Path) -> None:
    """Also one that was opened before all objects were frozen."""
    change = f"file = open({str(tmp_path / 'file')!r}, 'w'); binary = open({str(tmp_path / 'binary')!r}, 'w+b')"
    change += f"\n{freeze}\nfile.write('text'); binary.write(b'bytes')"
    text = CODE.replace("{arguments}", "['--version']").replace("{change}", change)
    subprocess.run([sys.executable, "-c", text], capture_output=True, check=True, timeout=50)
    assert tmp_path.joinpath("file").read_text() == "text"
    assert tmp_path.joinpath("binary").read_text() == "bytes"


def test_handler_that_is_registered_before_the_command_starts_runs(tmp_path: Path) -> None:
    """Such as that of a tracer or of a coverage measurement, which begin in ``sitecustomize``."""
    tmp_path.joinpath("sitecustomize.py").write_text("import atexit; atexit.register(print, 'first handler')")
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    command = [sys.executable, "-m", "bigincubate", "--version"]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=50)
    assert "first handler" in ended.stdout
