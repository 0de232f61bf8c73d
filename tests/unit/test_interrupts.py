"""Signals noted by `replfs demo` are never lost, whenever they come. In processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from replfs.cli import spawn

PRELUDE = """
import os, signal, sys, threading, time, subprocess
from replfs.cli.interrupts import Interrupted, Interrupts, start_thread
def me(number=signal.SIGINT): os.kill(os.getpid(), number)
"""


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PRELUDE + script],
        capture_output=True, text=True, timeout=60, check=False, env=spawn.environment(),
    )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


def test_a_signal_before_the_wait_ends_the_wait():
    out = run("""
with Interrupts() as interrupts:
    me()
    try:
        interrupts.wait([], 60)
    except Interrupted as stopped:
        print(stopped.exit_code)
""")
    assert out == "130\n"


def test_a_signal_during_the_wait_ends_the_wait():
    out = run("""
with Interrupts() as interrupts:
    main = threading.main_thread().ident
    start_thread(lambda: (time.sleep(0.2), me(signal.SIGTERM)), "sender")
    try:
        interrupts.wait([], 60)
    except Interrupted as stopped:
        print(stopped.exit_code)
""")
    assert out == "143\n"


def test_a_signal_never_raises_inside_other_code_and_is_seen_at_the_next_check():
    out = run("""
with Interrupts() as interrupts:
    try:
        while interrupts.number is None:
            child = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
            me()
            child.wait()
        print("nothing raised")
        interrupts.check()
    except Interrupted:
        print("seen")
""")
    assert out == "nothing raised\nseen\n"


def test_the_first_signal_counts_and_cleaning_up_is_shielded():
    out = run("""
with Interrupts() as interrupts:
    me(signal.SIGTERM)
    me(signal.SIGINT)
    interrupts.is_shielded = True
    interrupts.check()
    interrupts.wait([], 0.01)
    print(interrupts.settle())
""")
    assert out == "15\n"


def test_settling_finds_what_came_last_and_holds_back_what_comes_later():
    out = run("""
with Interrupts() as interrupts:
    print(interrupts.settle())
    me()
    print(interrupts.number)
    print(interrupts.settle())
""")
    assert out == "None\nNone\n2\n"


def test_readable_descriptors_are_reported():
    out = run("""
with Interrupts() as interrupts:
    read, write = os.pipe()
    print(interrupts.wait([read], 0))
    os.write(write, b"x")
    print(interrupts.wait([read], 60) == [read])
""")
    assert out == "[]\nTrue\n"


@pytest.mark.parametrize("delay_ms", range(0, 40, 4))
def test_at_whatever_moment_it_comes_the_program_ends_with_it(delay_ms):
    """A program that starts children in a loop, interrupted at ten different moments."""
    script = (
        PRELUDE
        + """
with Interrupts() as interrupts:
    try:
        print("ready", flush=True)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            subprocess.Popen(["true"], start_new_session=True).wait()
            interrupts.check()
    except Interrupted:
        pass
    number = interrupts.settle()
    sys.exit(0 if number is None else 128 + number)
"""
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, env=spawn.environment()
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(delay_ms / 1000)
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
