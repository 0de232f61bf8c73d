"""The documents say what the code does: links, keys, numbers, tables, the bytes of the example."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

import replfs
from benchmarks import pages as performance
from replfs import errors
from replfs.cli.exit_codes import ExitCode
from replfs.cli.main import MODULES as COMMANDS
from replfs.core import checks, messages, ops, relationship
from replfs.node.operating import status
from replfs.node.settings import config
from replfs.node.settings.options import OPTIONS, option_names
from replfs.transport import direct, flow, lane, libzmq, listener, zmtp

ROOT = Path(replfs.__path__[0]).parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
TEXTS = sorted(
    path
    for pattern in ("*.md", "*.toml", "dev", ".ci/*", "docs/**/*.md")
    for path in ROOT.glob(pattern)
) + sorted(
    path
    for directory in ("replfs", "tests", "benchmarks")
    for path in (ROOT / directory).rglob("*.py")
)
# Written so that this file does not contain them itself.
FOREIGN_WORDS = [
    r"\bissue[ ]?#?\d",
    r"\b(GH|PR)[-# ]\d",
    r"\bassis[t]ants?\b",
    r"\blanguage mode[l]|\bLL[M]s?\b|\bGP[T]\b|\bClau[d]e\b",
    r"/wor[k]/",
    r"/home/\w",
    r"\bTO[D]O\b|\bFIX[M]E\b|\bXX[X]\b",
]

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^\| (.+) \|$", re.MULTILINE)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def page(name: str) -> str:
    return text_of(DOCS / name)


def rows(text: str) -> list[list[str]]:
    """The cells of every table row."""
    return [[cell.strip() for cell in row.split("|")] for row in _ROW.findall(text)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """What its headings can be linked by, as the usual renderers make it."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE):
        plain = _LINK.sub(lambda link: link.group(0)[1:].partition("]")[0], heading)
        words = re.sub(r"[^\w\- ]", "", plain.lower())
        found.add(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    text = text_of(path)
    broken = []
    for link in _LINK.findall(_FENCE.sub("", text)):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        goal = (path.parent / target).resolve() if target else path
        if not goal.exists():
            broken.append(link)
        elif anchor and anchor not in anchors(text_of(goal)):
            broken.append(link)
    assert not broken


def test_texts_speak_to_those_who_have_nothing_but_this_repository():
    found = []
    for path in TEXTS:
        text = text_of(path)
        for pattern in FOREIGN_WORDS:
            for match in re.finditer(pattern, text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{name_of(path)}, line {line}: {match.group(0)!r}")
    assert len(TEXTS) > 50
    assert not found


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path in reached or path.suffix != ".md":
            continue
        reached.add(path)
        targets = [link.partition("#")[0] for link in _LINK.findall(text_of(path))]
        waiting += [(path.parent / target).resolve() for target in targets if "://" not in target]
    unreached = set(PAGES) - reached
    assert not unreached, f"link these from a page: {sorted(map(name_of, unreached))}"


# Configuration and commands ----------------------------------------------------------------------


def configuration_rows() -> dict[str, list[str]]:
    found = [
        row
        for row in rows(page("operations/configuration.md"))
        if not row[0].startswith("`REPLFS_")
    ]
    keys = [row[0].strip("`") for row in found if row[0].startswith("`")]
    assert len(keys) == len(set(keys))
    return {row[0].strip("`"): row for row in found if row[0].startswith("`")}


def test_every_key_is_documented_and_no_other():
    assert set(configuration_rows()) == set(option_names())


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_documented_defaults_are_the_defaults(option):
    documented = configuration_rows()[option.name][1]
    settings = config.build("mount", {"store": "/a", "mountpoint": "/b"}, config_file="/dev/null")
    default = getattr(settings, option.field)
    if documented.startswith("`") and option.name != "rundir":
        value = documented.partition("`")[2].partition("`")[0]
        assert option.read(value) == default
    elif documented == "none":
        assert default in (None, ())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command):
    text = page("operations/cli.md")
    assert re.search(rf"`(replfs )?{re.escape(command)}[ `]", text)


def test_every_exit_status_is_documented():
    documented = {row[0]: row[1] for row in rows(page("operations/cli.md")) if row[0].isdigit()}
    assert documented == {str(int(code)): code.meaning for code in ExitCode}


def test_every_error_has_an_exit_status_that_is_documented():
    classes = [
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.ReplfsError)
    ]
    assert classes
    assert {each.exit_code for each in classes} <= set(map(int, ExitCode))


def status_fields() -> set[str]:
    """The keys that the status is made of, from its source: a run shows only some of them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text_of(Path(status.__file__)))):
        if isinstance(node, ast.Dict):
            # A mapping of words to words is no part of it.
            pairs = zip(node.keys, node.values, strict=True)
            names = [key for key, value in pairs if not isinstance(value, ast.Constant)]
        elif isinstance(node, ast.Subscript):
            names = [node.slice]
        else:
            continue
        found |= {
            name.value
            for name in names
            if isinstance(name, ast.Constant) and isinstance(name.value, str)
        }
    return found


def test_every_field_of_the_status_is_documented():
    fields = status_fields()
    assert {"state", "peers", "dirty_bytes", "stuck", "last_error"} <= fields
    text = page("operations/cli.md")
    assert not [field for field in sorted(fields) if f"`{field}`" not in text]


# What applications see ---------------------------------------------------------------------------


def test_every_errno_that_replfs_makes_is_documented():
    """Local system calls' own errors are passed through; these are the ones made here."""
    made: set[str] = set()
    for directory in ("front", "node", "store"):
        for path in (ROOT / "replfs" / directory).rglob("*.py"):
            made |= set(
                re.findall(r"(?:failure|OSError|FUSEError)\(\s*errno\.(E\w+)", text_of(path))
            )
    made |= set(re.findall(r"errno = _errno\.(E\w+)", text_of(Path(errors.__file__))))
    assert {"EXDEV", "ESTALE", "EIO"} <= made
    text = page("SEMANTICS.md")
    assert not [name for name in sorted(made) if f"`{name}`" not in text]


def test_every_virtual_attribute_is_documented():
    text = page("SEMANTICS.md")
    names = {
        name
        for path in (ROOT / "replfs/node").rglob("*.py")
        for name in re.findall(r"b\"(user\.replfs\.[\w.]+)\"", text_of(path))
    }
    assert "user.replfs.policy" in names
    assert not [name for name in sorted(names) if f"`{name}`" not in text]


# The wire ----------------------------------------------------------------------------------------


def protocol_rows(heading: str) -> list[list[str]]:
    text = page("internals/protocol.md")
    section = text.partition(f"\n{heading}\n")[2]
    return rows(re.split(r"\n#", section)[0])


def quoted(names) -> str:
    return ", ".join(f"`{name}`" for name in names)


def test_the_table_of_operations():
    live, bulk = set(get_args(ops.LiveOp)), set(get_args(ops.BulkOp))
    expected = []
    for kind in get_args(ops.AnyOp):
        streams = [name for name, of in (("live", live), ("bulk", bulk)) if kind in of]
        fields = quoted(kind.__struct_fields__)
        expected.append([str(kind.__struct_config__.tag), f"`{kind.__name__}`", fields, *streams])
    documented = [
        [*row[:3], *row[3].split(", ")]
        for row in protocol_rows("## Operations")
        if row[0].isdigit()
    ]
    assert documented == expected


def test_the_fields_of_attributes():
    text = page("internals/protocol.md").partition("`attributes` is an array:")[2]
    fields = re.findall(r"`(\w+)`", text.partition("(a map)")[0])
    assert tuple(fields) == ops.Attributes.__struct_fields__


def test_the_table_of_answers():
    expected = [
        [str(kind.__struct_config__.tag), f"`{kind.__name__}`", quoted(kind.__struct_fields__)]
        for kind in get_args(ops.AnyAnswer)
    ]
    assert [row[:3] for row in protocol_rows("### Answers") if row[0].isdigit()] == expected


def test_the_table_of_kinds():
    documented = {row[1]: int(row[0]) for row in protocol_rows("## Kinds") if row[0].isdigit()}
    assert documented == {name: getattr(messages, name) for name in documented}
    assert sorted(documented.values()) == list(range(messages.HELLO, messages.BYE + 1))


def test_the_fields_of_an_identity():
    text = page("internals/protocol.md")
    missing = [
        field
        for kind in (messages.Hello, messages.Welcome, messages.Refuse, messages.Bye)
        for field in kind.__struct_fields__
        if f"`{field}`" not in text
    ]
    assert not missing


def test_the_example():
    """The bytes on the page are what the code makes."""
    block = page("internals/protocol.md").partition("### Example")[2].split("```")[1]
    hexes = [
        " ".join(re.findall(r"\b[0-9a-f]{2}\b", re.split(r"\s{4,}(?=\S*[a-z]{3})", line)[0]))
        for line in block.splitlines()
    ]
    write, answer = " ".join(hexes).split("68 65 6c 6c 6f")
    object_id = bytes.fromhex("a1b2c3d4e5f607180000000000000001")
    session = 0x1122334455667788
    operation = ops.Write(object_id, 4096, 1_700_000_000_000_000_000)
    assert bytes.fromhex(write) == messages.encode_op(0, session, 7, operation, b"hello")
    answers: list[tuple[int, ops.AnyAnswer]] = [(7, ops.Done(0, 5))]
    assert bytes.fromhex(answer) == messages.encode_answers(0, session, 7, answers)


LIMITS = {
    "head frame": f"{messages.HEAD_MAX >> 20} MiB",
    "payload frame": f"{ops.PAYLOAD_MAX >> 20} MiB",
    "operations on the way, per stream": f"{flow.WINDOW_OPS}, and {flow.WINDOW_BYTES >> 20} MiB",
    "the same, when one is sent that nobody awaits (`async`)": (
        f"{flow.QUEUE_OPS}, and `async-queue`"
    ),
    "answers remembered, per stream": (f"{lane.REMEMBERED}, and {lane.REMEMBERED_BYTES >> 20} MiB"),
    "operations accepted and not answered, per stream": f"{listener.DEFERRED_MAX}",
    "sessions offered and not taken": f"{listener.OFFERED_MAX}",
    "frames of a longer message that are skipped": f"{zmtp.FRAMES_MAX}",
    "connections to a listener": f"{direct.CONNECTIONS_MAX}",
    "bytes queued for a connection by a listener": f"{direct.QUEUE_MAX >> 20} MiB",
    "seconds for a connection's handshake": f"{direct.HANDSHAKE_S:.0f}",
    "messages read ahead per connection through libzmq": f"{libzmq.RECEIVE_QUEUE}",
    "answers in a message": f"{messages.ANSWERS_PER_MESSAGE}",
    "digests in an answer": f"{checks.DIGESTS_PER_ANSWER}",
    "names in `Gather` and `Listing`, hints in `Place`": f"{ops.NAMES_PER_MESSAGE}",
    "objects in `Forget`": f"{checks.FORGET_MAX}",
    "items in `PlaceMany`": f"{ops.ITEMS_PER_MESSAGE}",
    "a symlink's target": f"{ops.PATH_MAX} bytes",
    "generations in a history": f"{checks.HISTORY_MAX}",
}


def test_the_table_of_limits():
    documented = {row[0]: row[1] for row in protocol_rows("## Limits")}
    assert {name: documented.get(name) for name in LIMITS} == LIMITS


# Pages that are made -----------------------------------------------------------------------------


def test_the_page_of_replication_states_is_fresh():
    """If this fails: python -m replfs.core.relationship > docs/internals/relationship.md."""
    assert page("internals/relationship.md") == relationship.page()


def test_the_page_of_performance_is_fresh():
    """If this fails: python -m benchmarks pages."""
    assert page("PERFORMANCE.md") == performance.fresh_page()
