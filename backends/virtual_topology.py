"""Exchanges and bindings of kq's Kombu transport: one document in the store, the same for all programs.

It has a version: a change is made anew on whatever somebody else has written meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from kombu.transport import virtual

from kq.backends.store import Store


class TopologyChannel(virtual.Channel):
    """A channel whose exchanges and bindings are in a store."""

    @property
    def store(self) -> Store:
        """The store: all that Kombu's interface has no word for."""
        store: Store = self.connection.store
        return store

    def _queue_bind(self, *args: Any) -> None:
        """Do nothing: bindings are kept with the exchanges."""

    def exchange_declare(self, *args: Any, **kwargs: Any) -> None:
        self._change_topology(lambda: super(TopologyChannel, self).exchange_declare(*args, **kwargs))

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        def delete() -> None:
            if if_unused and self.state.exchanges.get(exchange, {}).get("table"):
                return
            self.state.exchanges.pop(exchange, None)
            for queue, source, routing_key in list(self.state.bindings):
                if source == exchange:
                    self.state.binding_delete(queue, source, routing_key)

        self._change_topology(delete)

    def queue_bind(self, queue: str, exchange: str | None = None, *args: Any, **kwargs: Any) -> None:
        def bind() -> None:
            name = exchange or "amq.direct"
            if name not in self.state.exchanges and name.startswith("amq."):
                super(TopologyChannel, self).exchange_declare(name, name.removeprefix("amq."), durable=True)
            super(TopologyChannel, self).queue_bind(queue, name, *args, **kwargs)

        self._change_topology(bind)

    def queue_unbind(self, *args: Any, **kwargs: Any) -> None:
        self._change_topology(lambda: super(TopologyChannel, self).queue_unbind(*args, **kwargs))

    def unbind_everywhere(self, queue: str) -> None:
        """Drop every binding of a queue."""

        def unbind() -> None:
            self.state.queue_bindings_delete(queue)
            for exchange in self.state.exchanges.values():
                exchange["table"] = [row for row in exchange["table"] if row[2] != queue]

        self._change_topology(unbind)

    def list_bindings(self) -> Any:
        self._load_topology()
        return super().list_bindings()

    def _load_topology(self) -> tuple[str, int]:
        document, version = self.store.read_topology()
        self.connection.state = _to_state(document)
        return document, version

    def _change_topology(self, change: Callable[[], Any]) -> None:
        """Apply a change to what all programs share; whoever was faster is not overwritten."""
        while True:
            before, version = self._load_topology()
            change()
            after = _to_document(self.state)
            if after == before or self.store.write_topology(after, version):
                return


def _to_state(document: str) -> virtual.base.BrokerState:
    data = json.loads(document)
    state = virtual.base.BrokerState()
    for name, exchange in data.get("exchanges", {}).items():
        state.exchanges[name] = {**exchange, "table": [tuple(row) for row in exchange["table"]]}
    for queue, exchange, routing_key, arguments in data.get("bindings", []):
        state.binding_declare(queue, exchange, routing_key, arguments)
    return state


def _to_document(state: virtual.base.BrokerState) -> str:
    bindings: Iterable[Any] = sorted(([*key], arguments) for key, arguments in state.bindings.items())
    return json.dumps(
        {"exchanges": state.exchanges, "bindings": [[*key, arguments] for key, arguments in bindings]},
        sort_keys=True,
    )
