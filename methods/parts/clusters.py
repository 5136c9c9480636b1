"""MELO's neuron index: clusters of keys with centres and radii, and the block that each key wakes.

Yu et al., "MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA", AAAI 2024, arXiv:2312.11795, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from methods.parts import recall

SPLIT = 1e-5  # by which the older of two conflicting clusters gets less than half their distance, the newer one more


@dataclass(frozen=True, eq=False)
class Cluster:
    """Prompts of one target (`labels`, its tokens): centre (d,) float32 and radius."""

    centre: Tensor
    radius: float
    labels: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Point:
    """A key (d,) float32, the cluster that owns it (-1: none any more) and the block it wakes."""

    key: Tensor
    owner: int
    block: int


@dataclass(eq=False)
class Book:
    """Clusters and points by number. Keeps in mind which of them were changed since it was made."""

    clusters: list[Cluster]
    points: list[Point]
    _clusters: set[int] = field(default_factory=set)
    _points: set[int] = field(default_factory=set)
    _kept: list[Tensor] = field(default_factory=list)  # the centres (c, d) as one tensor, until one changes

    @classmethod
    def empty(cls) -> Book:
        """One without clusters."""
        return cls([], [])

    def to(self, device: torch.device) -> Book:
        """The same on another device."""
        clusters = [Cluster(c.centre.to(device), c.radius, c.labels) for c in self.clusters]
        return Book(clusters, [Point(p.key.to(device), p.owner, p.block) for p in self.points])

    def changed(self) -> tuple[dict[int, Cluster], dict[int, Point]]:
        """Clusters and points that were added or changed, by number."""
        clusters = {n: self.clusters[n] for n in sorted(self._clusters)}
        return clusters, {n: self.points[n] for n in sorted(self._points)}

    def block(self, query: Tensor) -> int | None:
        """The block that `query` (d,) wakes, None when no cluster reaches it."""
        if not self.clusters:
            return None
        near, distance = recall.nearest(self._centres(), query)
        members = self._members(near)
        if distance > self.clusters[near].radius or not members:
            return None
        best, _ = recall.nearest(torch.stack([self.points[n].key for n in members]), query)
        return self.points[members[best]].block

    def take(self, key: Tensor, labels: tuple[int, ...], block: int, radius: float, noise: float) -> str:
        """Let `key` (d,), whose target is `labels`, wake `block`; says what became of it.

        `radius` is that of a new cluster, `noise` how far a key may be from itself when it is asked again.
        """
        if not self.clusters:
            return self._found(key, labels, block, radius)
        near, distance = recall.nearest(self._centres(), key)
        known = self.clusters[near]
        if distance > known.radius + radius:
            return self._found(key, labels, block, radius)
        if known.labels == labels:
            return self._join(near, key, block, radius, noise)
        if distance <= noise:
            return self._hand_over(near, key, labels, block, max(known.radius, noise))
        self._set_cluster(near, replace(known, radius=distance / 2 - SPLIT))
        for n in self._members(near):
            if float((self.points[n].key - known.centre).norm()) > distance / 2 - SPLIT:
                self._set_point(n, replace(self.points[n], owner=-1))
        self._found(key, labels, block, distance / 2 + SPLIT)
        return "split"

    def _found(self, key: Tensor, labels: tuple[int, ...], block: int, radius: float) -> str:
        number = len(self.clusters)
        self._set_cluster(number, Cluster(key, radius, labels))
        self._set_point(len(self.points), Point(key, number, block))
        return "new"

    def _join(self, near: int, key: Tensor, block: int, radius: float, noise: float) -> str:
        self._set_point(len(self.points), Point(key, near, block))
        keys = torch.stack([self.points[n].key for n in self._members(near)])
        centre = keys.mean(0)
        farthest = float((keys - centre).norm(dim=1).max()) + noise
        self._set_cluster(near, replace(self.clusters[near], centre=centre, radius=max(radius, farthest)))
        return "joined"

    def _hand_over(self, near: int, key: Tensor, labels: tuple[int, ...], block: int, radius: float) -> str:
        for n in self._members(near):
            self._set_point(n, replace(self.points[n], owner=-1))
        self._set_cluster(near, Cluster(key, radius, labels))
        self._set_point(len(self.points), Point(key, near, block))
        return "rewritten"

    def _members(self, cluster: int) -> list[int]:
        return [n for n, p in enumerate(self.points) if p.owner == cluster]

    def _centres(self) -> Tensor:
        if not self._kept:
            self._kept.append(torch.stack([c.centre for c in self.clusters]))
        return self._kept[0]

    def _set_cluster(self, number: int, cluster: Cluster) -> None:
        self.clusters[number : number + 1] = [cluster]
        self._clusters.add(number)
        self._kept.clear()

    def _set_point(self, number: int, point: Point) -> None:
        self.points[number : number + 1] = [point]
        self._points.add(number)
