"""A World with a registry: several routers, and nodes that they find there."""

from __future__ import annotations

from typing import Any

from pydantic import SecretStr

from kvrelay.config.cluster_config import NodeConfig, RegistryConfig, Role
from kvrelay.machine.contract import Announce, Started
from kvrelay.protocol.ids import ROUTER, PeerId, RequestId, peer_id
from kvrelay.protocol.request import SamplingParams
from kvrelay.registry.node_entry import NodeEntry
from router.events import Deliver, NewRequest, NodesFound, RegistryLost, Submitted
from router.machine import RouterMachine
from support.processes import NodeProcess, Process
from support.world import EOS, Client, World

POLL_S = 1.0
LEASE_S = 10.0
REGISTRY = RegistryConfig(kind="redis", url=SecretStr("redis://nowhere"), lease_s=LEASE_S)


class FollowingRouter(Process):
    """A router that reads the registry every second. Its clients are its own: ids may be another's too."""

    machine: RouterMachine

    def __init__(self, world: ManyRouters, incarnation: str, number: int) -> None:
        settings = world.router_settings(incarnation, first_epoch=number << 24)
        super().__init__(world, peer_id(ROUTER, incarnation), RouterMachine(settings), [])
        self.clients: dict[str, Client] = {}
        self.handle_with(Deliver, self._deliver)
        self.post(Started())
        self._read()

    def _deliver(self, action: Deliver) -> None:
        self.clients[action.request_id].take(action.delivery, self.world.now)

    def _read(self) -> None:
        assert isinstance(self.world, ManyRouters)
        if not self.alive:
            return
        if self.world.registry_is_up:
            self.handle(NodesFound(self.world.entries()))
        else:
            self.handle(RegistryLost("told to be"))
        self.world.after(POLL_S, self._read)

    @property
    def nodes(self) -> set[str]:
        """The names of the nodes it knows."""
        return {node.node_id for node in self.machine.node_table}


class ManyRouters(World):
    """``routers[i]`` serve side by side. The registry is a dict of leases."""

    def __init__(self, seed: int = 0, *, routers: int = 2, **options: Any) -> None:
        self.registry_is_up = True
        self.routers: list[FollowingRouter] = []
        self._leases: dict[PeerId, tuple[NodeEntry, float]] = {}
        self._num_routers = routers
        super().__init__(seed, **options)

    def _start_router(self) -> Any:
        self.routers = [self.start_router() for _ in range(self._num_routers)]
        return self.routers[0]

    def start_router(self) -> FollowingRouter:
        """Start another router."""
        number = next(self._incarnations)
        return FollowingRouter(self, f"{number:04x}", number)

    def kill_router(self, number: int) -> FollowingRouter:
        """SIGKILL a router, and with it its clients."""
        router = self.routers.pop(number)
        router.exit("killed")
        for client in router.clients.values():
            del self.clients[f"{router.peer}/{client.request_id}"]
        return router

    def config(self, name: str, role: Role, port: int) -> NodeConfig:
        """Return the config of a node that routers find in the registry."""
        return super().config(name, role, port).model_copy(update={"registry": REGISTRY})

    def start(self, name: str, role: Role, port: int | None = None) -> NodeProcess:
        """Start a node; it renews its lease as long as it lives and the registry is up."""
        node = super().start(name, role, port)
        node.connections.pop(ROUTER, None)
        started_s = self.now
        announced: list[NodeEntry] = []

        def announce(action: Announce) -> None:
            registration = node.machine._membership._registration
            announced[:] = [NodeEntry(registration=registration, state=action.state, started_s=started_s)]
            renew()

        def renew() -> None:
            if node.alive and announced and self.registry_is_up:
                self._leases[node.peer] = (announced[0], self.now + LEASE_S)

        def renew_always() -> None:
            renew()
            if node.alive:
                self.after(LEASE_S / 4, renew_always)

        node.handle_with(Announce, announce)
        renew_always()
        return node

    def entries(self) -> tuple[NodeEntry, ...]:
        """Return what a router reads."""
        return tuple(entry for entry, until_s in self._leases.values() if until_s > self.now)

    def lose_registry(self) -> None:
        """Let the registry go down, and all it knew with it."""
        self.registry_is_up = False
        self._leases.clear()

    def is_ready(self) -> bool:
        """Return whether every router knows every node."""
        return all(router.nodes == set(self.nodes) for router in self.routers)

    def submit_to(
        self, number: int, prompt: int | list[int], max_tokens: int = 8, request_id: str | None = None
    ) -> Client:
        """Ask the router ``routers[number]`` for a completion."""
        router = self.routers[number]
        token_ids = self.prompt(prompt) if isinstance(prompt, int) else prompt
        request_id = request_id or f"r{next(self._request_numbers)}"
        seed = self.rng.getrandbits(32)
        params = SamplingParams(max_tokens=max_tokens, seed=seed, temperature=0.0, eos_token_ids=[EOS])
        client = Client(request_id, token_ids, params, self.reference(token_ids, params), self.now)
        router.clients[request_id] = self.clients[f"{router.peer}/{request_id}"] = client
        router.handle(Submitted((NewRequest(RequestId(request_id), token_ids, params, 0),)))
        return client
