"""What an app asks its policies."""

from __future__ import annotations

import gc

import pytest

import kq
from kq.errors import PermissionDenied
from kq.guard import Guard, pointless
from kq.security import Actor, Policy, Scope, can, context, current_actor, set_strict

ANN = Actor("user:ann")
CLERKS = Policy("clerks", actions="queue.publish*", resources="*", groups=["clerks"])


def test_an_actor_without_a_scope_is_under_the_app_s_policies() -> None:
    """Naming an actor alone does not leave the policies behind, though strict mode is off; another scope does."""
    guard = Guard([CLERKS, Policy("look", actions="queue.admin.queue", resources="a:b")])
    with context(ANN):
        with pytest.raises(PermissionDenied, match=r"queue\.publish is denied"):
            guard.publish("a:b", {})
        with pytest.raises(PermissionDenied, match=r"queue\.consume\.queue"):
            guard.consume("a:b")
        guard.administer("a:b")
        # An app that has no policies has nothing to ask.
        Guard().publish("a:b", {})
    with context(ANN, Scope([CLERKS], groups=["clerks"])):
        guard.publish("a:b", {})


def test_one_group_is_a_name_and_not_its_letters() -> None:
    """A single group may be given as text, as for policies and scopes."""
    guard = Guard([CLERKS], actor=ANN, groups="clerks")
    assert guard.groups == {"clerks"}
    for serving in (guard.acting(ANN, "clerks"), guard.serving()):
        with serving:
            guard.publish("a:b", {})


def test_a_lax_app_does_not_loosen_a_strict_process() -> None:
    """Strict mode, once set by the program or an app, stays; each app's own checks follow that app alone."""
    set_strict(True)
    lax = kq.App("lax", broker="memory://")
    assert not can("queue.publish", "")
    lax.publish("a:b", 1)
    with lax.acting(None):
        assert can("queue.publish", "")
    set_strict(False)
    strict = kq.App("strict", broker="memory://", strict_mode=True)
    kq.App("lax", broker="memory://")
    assert not can("queue.publish", "")
    with pytest.raises(PermissionDenied):
        strict.publish("a:b", 1)


def test_a_strict_app_makes_its_process_strict_until_it_is_closed() -> None:
    """What is made of a URL after that is as strict as its environment; another strict app still counts."""
    with kq.App("other", broker="memory://", strict_mode=True):
        kq.App("strict", broker="memory://", strict_mode=True).close()
        with kq.Producer("memory://") as producer, pytest.raises(PermissionDenied, match="strict mode"):
            producer.publish("a:b", 1)
        assert not can("x", "y")
    assert can("x", "y")
    with kq.Producer("memory://") as producer:
        producer.publish("a:b", 1)
    set_strict(True)
    with kq.App("strict", broker="memory://", strict_mode=True):
        pass
    assert not can("x", "y")


def test_a_process_is_strict_as_long_as_anything_of_its_strict_app_is_used() -> None:
    """Whoever keeps a producer need not keep the app; and one that was closed may be used again."""
    may = [Policy("any", actions=["*"], resources=["*"])]
    app = kq.App("strict", broker="memory://", strict_mode=True, policies=may, actor="service:web")
    producer = kq.Producer(app)
    # The latest one is kept.
    app = kq.App("lax", broker="memory://")
    gc.collect()
    assert not can("x", "y")
    producer.close()
    del producer
    gc.collect()
    assert can("x", "y")
    with kq.App("strict", broker="memory://", strict_mode=True, policies=may) as app:
        app.close()
        assert can("x", "y")
        # As a worker or a consumer has one.
        app.registry.open().close()
        assert not can("x", "y")
        app.close()
        assert can("x", "y")
        with app.acting(Actor("service:web")):
            app.publish("a:b", 1)
        assert not can("x", "y")
    assert can("x", "y")


@pytest.mark.parametrize("by_environment", [True, False])
def test_strict_mode_binds_producers_and_pullers_without_an_app(
    monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    """What is made of a URL is as strict as its environment or the process."""
    if by_environment:
        monkeypatch.setenv("KQ_STRICT_MODE", "1")
    else:
        set_strict(True)
    with kq.Producer("memory://") as producer, pytest.raises(PermissionDenied, match="strict mode"):
        producer.publish("a:b", 1)
    with pytest.raises(PermissionDenied, match="strict mode"):
        kq.Consumer("memory://", "a:b")


def test_handlers_do_not_act_as_whoever_drains() -> None:
    """A handler, sync or async, acts as its app, which may be nobody, whoever has it run."""
    app = kq.App("drained", broker="memory://")
    acting: list[Actor | None] = []

    @app.consumer("drained:async")
    async def wait(payload: object) -> None:
        acting.append(current_actor())

    @app.consumer("drained:sync")
    def work(payload: object) -> None:
        acting.append(current_actor())

    with context(ANN, Scope([Policy("all", actions="*", resources="*")])):
        for queue in ("drained:async", "drained:sync"):
            app.publish(queue, 1)
        assert app.drain(20) == 2
    assert acting == [None, None]


def test_a_supervisor_works_otherwise_under_other_rules_and_keys() -> None:
    """Policies, actor and keys that Python declares are in the fingerprint, by which a reload tells what changed."""

    def fingerprint(role: str = "clerk", meta: int = 1, key: str = "k" * 32, groups: str = "g") -> str:
        policy = Policy("p", actions="*", resources="*", groups=groups, conditions=[
            {"field": "actor.meta.role", "operator": "eq", "value": role}])  # fmt: skip
        return kq.App(
            "app", broker="memory://", policies=[policy], actor=Actor("a", {"m": meta}), signing=kq.Signing({"k": key})
        ).fingerprint()

    others = [fingerprint("boss"), fingerprint(meta=2), fingerprint(key="x" * 32), fingerprint(groups="h")]
    assert fingerprint() == fingerprint()
    assert len({fingerprint(), *others}) == 5


@pytest.mark.parametrize(
    ("actions", "resources", "words"),
    [
        ("queue.publsh", "*", "kq asks for no action queue.publsh"),
        ("mine.*", "*", "kq asks for no action mine"),
        ("queue.publish", "app:*", "asked for without a resource"),
        (["queue.publish", "mine"], ["app:*", "b"], "asked for without a resource"),
        ("queue.publish", "*", ""),
        ("queue.publish", ["", "app:*"], ""),
        ("queue.publish*", "app:*", ""),
        ("queue.publish.queue", "app:*", ""),
        ("*", "app:*", ""),
    ],
)
def test_policies_that_apply_to_nothing_are_known(actions: str, resources: str, words: str) -> None:
    """A policy that no request of kq's can meet is a mistake, most of the time."""
    why = pointless(Policy("p", actions=actions, resources=resources))
    assert bool(why) == bool(words)
    assert words in why
