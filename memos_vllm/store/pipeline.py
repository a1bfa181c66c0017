"""The order in which pieces go through the streams of a device. Knows no device, so it is tested with one
that runs what it may in the worst order.

    load  staged  copy stream    host rows -> ring buffer                       records `copied`
                  kernel stream  waits for `after`, `copied`;  buffer -> blocks          `ended`
    save  staged  kernel stream  waits for `after`;            blocks -> ring buffer     `gathered`
                  copy stream    waits for `gathered`;         buffer -> host rows       `ended`
    direct        kernel stream  waits for `after`; one kernel between host rows and blocks
    dma           copy stream    waits for `after`; one copy per fragment, host rows <-> blocks

The next piece's copy runs while this one's kernel does, each direction in its own streams. A piece
holds a place of the ring until the host has seen `ended`; only then are its buffer, rows and blocks
anybody else's. `after` lies behind the work that fills the blocks of a save, or that last used those
of a load; the copy into a ring buffer touches neither, so a load's first bytes need not wait for it.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

from memos_vllm.store.host_memory import RowGroup

logger = logging.getLogger(__name__)

RING_PIECES = 3
"""Per direction: one in the copy, one in the kernel, one on its way to or from the host.

The most that a live load finds before it of a prefetch, too: 48 MiB (``link.DEVICE_PIECE_BYTES``), a millisecond at
50 GB/s.
"""

Landed = Callable[[Exception | None], None]
"""Called once, from any thread, when the bytes have arrived or never will, and nothing uses rows or blocks."""


class Method(StrEnum):
    """How the bytes of a piece get across."""

    STAGED = "staged"
    DIRECT = "direct"
    DMA = "dma"


class Event(Protocol):
    def synchronize(self) -> None:
        """Blocks the calling thread until the device is past the point; raises if it cannot get there."""


class Stream(Protocol):
    """Work runs in the order in which it was given; nothing is said about other streams."""

    def wait(self, event: Any) -> None:
        """What is given from now on runs after the event."""

    def record(self) -> Event:
        """The point behind all that was given so far."""


class Device(ABC):
    """What a pipeline asks of a device. All but ``buffer`` return at once; the work runs in the stream."""

    methods: frozenset[Method]
    """Those that it can do."""

    def begin_thread(self) -> None:  # noqa: B027
        """Called in a thread before it waits for the device."""

    @abstractmethod
    def stream(self) -> Stream: ...

    @abstractmethod
    def buffer(self) -> Any:
        """Memory on the device for one piece; made for one place of a ring, kept for good."""

    # A load may be of one group of layers (``layer_groups``), which is then named by its number; the rows that come
    # with it have the columns of that group only.

    @abstractmethod
    def copy_in(self, stream: Stream, groups: Sequence[RowGroup], buffer: Any) -> None: ...

    @abstractmethod
    def scatter(self, stream: Stream, buffer: Any, block_ids: Sequence[int], layers: int | None) -> None: ...

    @abstractmethod
    def gather(self, stream: Stream, block_ids: Sequence[int], buffer: Any) -> None: ...

    @abstractmethod
    def copy_out(self, stream: Stream, buffer: Any, groups: Sequence[RowGroup]) -> None: ...

    @abstractmethod
    def load_direct(
        self, stream: Stream, groups: Sequence[RowGroup], block_ids: Sequence[int], layers: int | None
    ) -> None: ...

    @abstractmethod
    def save_direct(self, stream: Stream, block_ids: Sequence[int], groups: Sequence[RowGroup]) -> None: ...

    @abstractmethod
    def load_fragments(
        self, stream: Stream, groups: Sequence[RowGroup], block_ids: Sequence[int], layers: int | None
    ) -> None: ...

    @abstractmethod
    def save_fragments(self, stream: Stream, block_ids: Sequence[int], groups: Sequence[RowGroup]) -> None: ...


class Pipeline(ABC):
    """Pieces of one direction. One thread issues them; a thread of the pipeline sees them land, in order."""

    def __init__(self, device: Device, name: str, depth: int = RING_PIECES) -> None:
        self._device = device
        self._copies, self._kernels = device.stream(), device.stream()
        self._ring = Ring(device, depth)
        self._landing = Landing(name, device.begin_thread)

    def issue(
        self,
        groups: Sequence[RowGroup],
        block_ids: Sequence[int],
        after: Any,
        method: Method,
        landed: Landed,
        layers: int | None = None,
    ) -> Event:
        """Gives one piece to the device; waits while the ring is full.

        Returns:
            The point behind all of it.

        Raises:
            Exception: nothing of the piece is under way, and ``landed`` is not called.
        """
        place = self._ring.take()
        try:
            match method:
                case Method.STAGED:
                    ended = self._staged(groups, block_ids, self._ring.buffer(place), after, layers)
                case Method.DIRECT:
                    ended = self._direct(groups, block_ids, after, layers)
                case Method.DMA:
                    ended = self._fragments(groups, block_ids, after, layers)
        except BaseException:
            self._settle()  # what was given before the error still uses rows, blocks and buffer
            self._ring.give_back(place)
            raise
        self._landing.expect(ended, partial(self._land, place, landed))
        return ended

    def make_buffers(self) -> None:
        """All of the ring now, so that no later piece can fail for want of memory."""
        self._ring.make_buffers()

    def refuse(self) -> None:
        """No more pieces; who waits for a place of the ring is let go with an OSError."""
        self._ring.close()

    def close(self, timeout_s: float) -> bool:
        """Lets what was issued land, refuses more. False if the device does not answer."""
        self._ring.close()
        return self._landing.close(timeout_s)

    @abstractmethod
    def _staged(
        self, groups: Sequence[RowGroup], block_ids: Sequence[int], buffer: Any, after: Any, layers: int | None
    ) -> Event: ...

    @abstractmethod
    def _direct(
        self, groups: Sequence[RowGroup], block_ids: Sequence[int], after: Any, layers: int | None
    ) -> Event: ...

    @abstractmethod
    def _fragments(
        self, groups: Sequence[RowGroup], block_ids: Sequence[int], after: Any, layers: int | None
    ) -> Event: ...

    def _wait(self, stream: Stream, event: Any) -> None:
        if event is not None:
            stream.wait(event)

    def _settle(self) -> None:
        try:
            for stream in (self._copies, self._kernels):
                stream.record().synchronize()
        except BaseException:
            self._ring.close()  # a device that has failed: its buffers are nobody's any more
            raise

    def _land(self, place: int, landed: Landed, error: Exception | None) -> None:
        self._ring.give_back(place)
        landed(error)


class LoadPipeline(Pipeline):
    """Host rows to blocks."""

    def _staged(
        self, groups: Sequence[RowGroup], block_ids: Sequence[int], buffer: Any, after: Any, layers: int | None
    ) -> Event:
        self._device.copy_in(self._copies, groups, buffer)
        copied = self._copies.record()
        self._wait(self._kernels, after)
        self._wait(self._kernels, copied)
        self._device.scatter(self._kernels, buffer, block_ids, layers)
        return self._kernels.record()

    def _direct(self, groups: Sequence[RowGroup], block_ids: Sequence[int], after: Any, layers: int | None) -> Event:
        self._wait(self._kernels, after)
        self._device.load_direct(self._kernels, groups, block_ids, layers)
        return self._kernels.record()

    def _fragments(self, groups: Sequence[RowGroup], block_ids: Sequence[int], after: Any, layers: int | None) -> Event:
        self._wait(self._copies, after)
        self._device.load_fragments(self._copies, groups, block_ids, layers)
        return self._copies.record()


class SavePipeline(Pipeline):
    """Blocks to host rows."""

    def _staged(
        self, groups: Sequence[RowGroup], block_ids: Sequence[int], buffer: Any, after: Any, layers: int | None
    ) -> Event:
        self._wait(self._kernels, after)
        self._device.gather(self._kernels, block_ids, buffer)
        gathered = self._kernels.record()
        self._wait(self._copies, gathered)
        self._device.copy_out(self._copies, buffer, groups)
        return self._copies.record()

    def _direct(self, groups: Sequence[RowGroup], block_ids: Sequence[int], after: Any, layers: int | None) -> Event:
        self._wait(self._kernels, after)
        self._device.save_direct(self._kernels, block_ids, groups)
        return self._kernels.record()

    def _fragments(self, groups: Sequence[RowGroup], block_ids: Sequence[int], after: Any, layers: int | None) -> Event:
        self._wait(self._copies, after)
        self._device.save_fragments(self._copies, block_ids, groups)
        return self._copies.record()


class Ring:
    """Places for pieces in flight, each with a buffer on the device that is made at its first use."""

    def __init__(self, device: Device, depth: int) -> None:
        self._device = device
        self._buffers: list[Any] = [None] * depth
        self._free = list(range(depth))
        self._changed = threading.Condition()
        self._closed = False

    def take(self) -> int:
        """A place that nothing uses; waits for one. Raises OSError after ``close``."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            if self._closed:
                raise OSError("the device's transfer ring is closed")
            return self._free.pop()  # the last one given back: few pieces in flight need few buffers

    def buffer(self, place: int) -> Any:
        if self._buffers[place] is None:
            self._buffers[place] = self._device.buffer()
        return self._buffers[place]

    def make_buffers(self) -> None:
        for place in range(len(self._buffers)):
            self.buffer(place)

    def give_back(self, place: int) -> None:
        with self._changed:
            assert place not in self._free
            self._free.append(place)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Landing:
    """A thread that waits for events in the order in which they were given, and says so."""

    def __init__(self, name: str, begin_thread: Callable[[], None]) -> None:
        self._begin_thread = begin_thread
        self._expected: deque[tuple[Event, Landed]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def expect(self, event: Event, landed: Landed) -> None:
        with self._changed:
            self._expected.append((event, landed))
            self._changed.notify()

    def close(self, timeout_s: float) -> bool:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        self._begin_thread()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._expected or self._closed)
                if not self._expected:
                    return
                event, landed = self._expected.popleft()
            failed: Exception | None = None
            try:
                event.synchronize()
            except Exception as error:
                failed = error
            try:
                landed(failed)
            except Exception:
                logger.exception("an error in taking note of a copy's end")  # the next ones are not to wait for ever
