"""Every system call that changes a file, in turn: the process is killed there, or the disk is full from there on.

A small library is preloaded that counts the calls of Python and SQLite alike, so no moment of a commit is left out.
Run as a script, this file is the driver that forks one process for each call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from everlearn.errors import StoreError
from everlearn.learner.store import Heard, MemoryStore

SECRET = "Zbigniew's locker code is 4711"

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <unistd.h>
static long count, target = -1;
static int full;
void set_fault(long at, int is_full) { count = 0; target = at; full = is_full; }
static int due(void) { count++; return target >= 0 && (full ? count >= target : count == target); }
static void point(void) { if (due() && !full) kill(getpid(), SIGKILL); }
#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
/* a killed write has written its first half */
#define WRITE(half, all) \
  if (due()) { if (full) { errno = ENOSPC; return -1; } half; kill(getpid(), SIGKILL); } return all
int unlink(const char *p) { REAL(int, unlink, const char *); point(); return real(p); }
int rename(const char *a, const char *b) { REAL(int, rename, const char *, const char *); point(); return real(a, b); }
int fsync(int d) { REAL(int, fsync, int); point(); return real(d); }
int fdatasync(int d) { REAL(int, fdatasync, int); point(); return real(d); }
int ftruncate(int d, off_t n) { REAL(int, ftruncate, int, off_t); point(); return real(d, n); }
int ftruncate64(int d, off_t n) { REAL(int, ftruncate64, int, off_t); point(); return real(d, n); }
ssize_t write(int d, const void *b, size_t n) {
  REAL(ssize_t, write, int, const void *, size_t); WRITE(real(d, b, n / 2), real(d, b, n)); }
ssize_t pwrite(int d, const void *b, size_t n, off_t o) {
  REAL(ssize_t, pwrite, int, const void *, size_t, off_t); WRITE(real(d, b, n / 2, o), real(d, b, n, o)); }
ssize_t pwrite64(int d, const void *b, size_t n, off_t o) {
  REAL(ssize_t, pwrite64, int, const void *, size_t, off_t); WRITE(real(d, b, n / 2, o), real(d, b, n, o)); }
"""

TASKS = {
    "hear": lambda store: store.add_observations([Heard("left " * 5000), Heard("right")]),
    "sleep": lambda store: store.commit_night(b"n" * 99999, consolidated=[3], dismissed=[4], dreams={3: ["d" * 9000]}),
    "forget": lambda store: store.forget([1], b"rebuilt" * 999),
    "rollback": lambda store: store.rollback(1),
    "prune": lambda store: store.prune([1]),
    "settings": lambda store: store.update_settings(width=8),
    "import": lambda store: (store.close(), MemoryStore.import_("other.zip", store.path, replace=True)),
}


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    place = tmp_path_factory.mktemp("shim")
    (place / "shim.c").write_text(SHIM)
    command = [compiler, "-shared", "-fPIC", "-o", str(place / "shim.so"), str(place / "shim.c"), "-ldl"]
    subprocess.run(command, check=True)
    return place / "shim.so"


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("fault", ["kill", "full"])
def test_a_fault_at_every_system_call_is_all_or_nothing(shim, tmp_path, task, fault):
    command = [sys.executable, __file__, task, fault]
    environment = os.environ | {"LD_PRELOAD": str(shim)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    undone, calls = map(int, done.stdout.split())
    assert 1 <= undone < calls


def look(folder):
    """Return all that a memory holds, after checking that its files are exactly those its index names."""
    with MemoryStore.open(folder) as store:
        files = sorted(os.listdir(folder / "nights"))
        assert files == sorted(night.file for night in store.nights() if night.unavailable is None), files
        assert sorted(os.listdir(folder)) == ["index.sqlite", "lock", "memory.json", "nights"]
        nights = [(night.n, night.parent, night.sha256, night.unavailable is None) for night in store.nights()]
        seen = [(item.id, item.text, item.state, item.meta) for item in store.history()]
        states = [store.load_state(n) for n in store.status()["available"]]
        return seen, store.dreams(), nights, store.head, states, store.settings


def prepare(folder):
    with MemoryStore.open(folder) as store:
        filler = [Heard(f"filler {n} " * 100) for n in range(30)]
        store.add_observations([Heard(SECRET * 50, meta={"quote": SECRET}), Heard("fact"), Heard("talk"), *filler])
        store.commit_night(b"old" * 999, consolidated=[1], dreams={1: [{"q": SECRET * 30}] * 3})
        store.commit_night(b"mid" * 999, consolidated=[2], dreams={2: ["fact"]})
    with MemoryStore.open("other") as other:
        other.add_observation("another life")
        other.commit_night(b"theirs" * 100, consolidated=[1])
        other.export("other.zip")


def child(folder, task, fault, at):
    """Do the task with a fault at call ``at``; end with status 0 if it succeeded, 1 if it reported the full disk."""
    store = MemoryStore.open(folder)
    shim = ctypes.CDLL(None)
    shim.set_fault(ctypes.c_long(at), fault == "full")
    try:
        TASKS[task](store)
    except StoreError as error:
        shim.set_fault(ctypes.c_long(-1), 0)
        os._exit(1 if error.errno == errno.ENOSPC or "are forgotten, but" in str(error) else 2)
    os._exit(0)


def main(task, fault):
    """Print after how many calls the task was undone, and how many it makes."""
    template, place = Path("template").resolve(), Path("place").resolve()
    prepare(template)
    before, done, undone = look(template), None, 0
    for at in [-1, *range(1, 1000)]:  # first the run without a fault
        shutil.rmtree(place, ignore_errors=True)
        folder = place / "ann"
        shutil.copytree(template, folder)
        pid = os.fork()
        if pid == 0:
            child(folder, task, fault, at)
        status = os.waitpid(pid, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or os.WEXITSTATUS(status) in (0, 1), (at, status)
        if task != "import":
            with MemoryStore.open(folder, read_only=True) as reader:
                reader.load_state()
        after = look(folder)
        done = after if at == -1 else done
        assert after in (before, done), at
        assert os.listdir(place) == ["ann"], at
        if task == "forget" and after == done:
            assert not any(SECRET[:12].encode() in f.read_bytes() for f in folder.rglob("*") if f.is_file()), at
        undone += after == before
        if status == 0 and at > 0:
            assert after == done
            print(undone, at)
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
