"""What a change of role does to a store, and what a store that is stopped knows of others."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.states import opened

from replfs.core.dirty import DirtyLog
from replfs.core.unstable import Unstable
from replfs.errors import ReplfsError
from replfs.node.asking.identity import welcome_of
from replfs.node.failover.adoption import adopt
from replfs.node.failover.promotion import promote_stopped
from replfs.node.roles import reign
from replfs.node.roles.roles import Roles
from replfs.node.settings.values import PeerSetting
from replfs.store.state import UNSTABLE

ONE, TWO, GENERATION = (bytes([n]) * 16 for n in (1, 2, 3))


@pytest.fixture
def store(tmp_path):
    """A secondary that has had a complete copy."""
    directory = tmp_path / "store"
    directory.mkdir()
    with opened(directory) as state:
        state.update(
            role="secondary", volume=GENERATION, generation=GENERATION, uninitialized=False
        )
        state.started()
    return directory


def unstable():
    log = DirtyLog()
    log.mark_data(ONE, 0, 1, handle=b"h")
    log.mark_name(TWO, b"name")
    return log


class Killed(Exception):
    """The process is."""


def roles_of(state):
    """As much of a node's roles as there is to a promotion of a secondary at work."""
    replica = SimpleNamespace(unstable=Unstable())
    secondary = SimpleNamespace(unstable=unstable, replica=replica, is_over=True)
    roles: Any = SimpleNamespace(
        state=state, secondary=secondary, progress=7, _build_secondary=lambda _number: None,
        peers=lambda: [PeerSetting("b", "tcp://b:1")],
    )  # fmt: skip
    return roles


def test_a_promotion_that_was_cut_off_is_begun_anew_with_what_it_knew(store, monkeypatch):
    """Not with a comparison of everything."""
    with opened(store) as state, monkeypatch.context() as patch:
        patch.setattr(reign, "promote", raising(Killed))
        with pytest.raises(Killed):
            Roles.begin_reign(roles_of(state))
    with opened(store) as state:
        assert state.unclean
        roles = roles_of(state)
        Roles.build(roles)
        found = roles.secondary.replica.unstable.snapshot(everywhere=True)
        assert list(found.objects()) == list(unstable().objects())
        # From here on more may be applied.
        assert state.peer(UNSTABLE) is None
        Roles.begin_reign(roles)
        assert state.identity().role == "primary"
        assert state.peer(UNSTABLE) is None
        assert set(state.load_log("b").objects()) == {ONE, TWO}


def raising(error):
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_what_was_kept_for_it_is_void_where_it_fails_and_where_power_was_lost(store):
    with opened(store) as state:
        reign.keep_unstable(state, unstable())
        roles = roles_of(state)
        Roles._go_on(roles, roles.secondary)
        assert state.peer(UNSTABLE) is None
        assert not roles.secondary.is_over
        reign.keep_unstable(state, unstable())
        state.memory_lost = True
        Roles.build(roles)
        assert state.peer(UNSTABLE) is None
        assert roles.secondary.replica.unstable.snapshot(everywhere=True) is None


def test_it_applies_nothing_more_where_that_cannot_be_saved(store, monkeypatch):
    failures: list[ReplfsError] = []
    with opened(store) as state:
        reign.keep_unstable(state, unstable())
        roles = roles_of(state)
        roles._fail, roles.settings = failures.append, SimpleNamespace(store=store)
        monkeypatch.setattr(state, "forget_peer", raising(OSError(errno.ENOSPC, "full")))
        Roles._go_on(roles, roles.secondary)
        assert roles.secondary.is_over
        assert "full" in str(failures[0])


def test_what_others_may_lack_is_kept_at_a_clean_stop(store):
    with opened(store) as state:
        reign.keep_unstable(state, unstable())
        assert state.peers() == []
        state.stopped_cleanly()
    with opened(store) as state:
        kept = reign.kept_unstable(state)
        assert kept is not None
        assert list(kept.saved()) == list(unstable().saved())
        state.memory_lost = True
        assert reign.kept_unstable(state) is None


def test_what_is_not_known_is_not_kept(store):
    with opened(store) as state:
        reign.keep_unstable(state, unstable())
        reign.keep_unstable(state, None)
        state.stopped_cleanly()
    with opened(store) as state:
        assert reign.kept_unstable(state) is None


def test_the_logs_of_a_store_promoted_while_stopped_begin_with_that(store):
    with opened(store) as state:
        reign.keep_unstable(state, unstable())
        state.stopped_cleanly(7)
    with opened(store) as state:
        promote_stopped(state, state._root, force=False, tentative=False)
    with opened(store) as state:
        reign.begin_stopped(state, [PeerSetting("b", "tcp://b:1")])
        log = state.load_log("b")
        assert set(log.objects()) == {ONE, TWO}
        marks = log.marks(ONE)
        assert marks is not None
        assert marks.compare
        found = state.peer("b")
        assert found is not None
        assert (found.base, found.is_asked, found.state) == (GENERATION, False, "out_of_sync")
        assert (state.identity().base, state.identity().base_progress) == (GENERATION, 7)
        # Changes were not recorded for a peer that is configured later.
        assert state.peer(UNSTABLE) is None
        reign.begin_stopped(state, [PeerSetting("c", "tcp://c:1")])
        assert state.peer("c") is None


def test_a_store_promoted_after_a_kill_knows_nothing_of_others(store):
    with opened(store) as state:
        promote_stopped(state, state._root, force=False, tentative=False)
    with opened(store) as state:
        reign.begin_stopped(state, [PeerSetting("b", "tcp://b:1")])
        assert state.peer("b") is None


def test_nor_does_one_that_was_promoted_by_force(store):
    with opened(store) as state:
        state.update(inconsistent=True)
        reign.keep_unstable(state, unstable())
        state.stopped_cleanly()
    with opened(store) as state:
        promote_stopped(state, state._root, force=True, tentative=False)
        assert state.peer(UNSTABLE) is None


def test_all_that_a_loser_began_apart_is_decided_against_and_nothing_before(store):
    """Who followed it, and was left behind by it, has none of the winner's earlier states."""
    apart, later, won, before = (bytes([n]) * 16 for n in (5, 6, 7, 8))
    with opened(store) as state:
        state.update(generation=ONE, history=(GENERATION, before), discarded=(TWO,))
        loser = welcome_of(state)
        loser.generation, loser.history = later, [apart, won, GENERATION, before]
        reign.supersede(state, loser)
        mine = state.identity()
        assert mine.discarded == (later, apart, won, TWO)
        assert set(mine.history) == {ONE, later, apart, won, GENERATION, before}


def test_a_copy_that_becomes_a_store_of_its_own_has_nothing_that_others_lack(store):
    with opened(store) as state:
        state.save_peer("b", node=ONE)
        state.update(discarded=(TWO,))
        reign.suspect(state, ONE, unstable())
        reign.keep_unstable(state, unstable())
        before = state.identity()
        assert adopt(state, new=True, tentative=True) == (
            "it would be a store of its own now, without its peers (b)"
        )
        assert state.identity() == before
        assert reign.suspects_of(state) is not None
        adopt(state, new=True, tentative=False)
        assert state.identity().node != before.node
        assert not state.identity().discarded
        assert not state.peers()
        assert reign.suspects_of(state) is None
        assert state.peer(UNSTABLE) is None
