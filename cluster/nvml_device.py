"""One card as NVML knows it: found by UUID, and found again after the driver went away.

NVML ignores CUDA_VISIBLE_DEVICES and counts cards in another order than CUDA, so an index of one is
nothing to the other. Every question may go unanswered: cards differ in what they support, drivers
are replaced under running processes, and cards fall off the bus.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections.abc import Callable
from typing import Any

_FIND_AGAIN_S = 5.0
_ASK_AGAIN_S = 600.0
# Values of nvmlReturn_t, https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceEnumvs.html
_SUCCESS = 0
# InvalidArgument, NotSupported, NoPermission, FunctionNotFound, ArgumentVersionMismatch, Deprecated
_LASTING = frozenset({2, 3, 4, 13, 25, 26})
# Uninitialized, DriverNotLoaded, LibraryNotFound, GpuIsLost, ResetRequired, LibRmVersionMismatch,
# GpuNotFound
_GONE = frozenset({1, 9, 12, 15, 16, 18, 28})
# nvmlValueType_t -> member of the union nvmlValue_t
_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")

_log = logging.getLogger(__name__)


class NvmlSilence(Exception):  # an answer that did not come is no error
    """One question went unanswered; the message says why.

    Args:
        reason: In NVML's words.
        lasting: Asking again would bring the same: the card or the driver cannot tell this.
    """

    def __init__(self, reason: str, *, lasting: bool) -> None:
        super().__init__(reason)
        self.lasting = lasting


class NvmlGone(NvmlSilence):
    """There is no card to ask: no NVML, no driver, or no card of that UUID."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, lasting=False)


class NvmlDevice:
    """Asks NVML about one card. Constructing it asks nothing and cannot fail.

    A question that the card does not support is asked again after ten minutes at the earliest; a
    card that is gone is looked for again after five seconds at the earliest.

    Args:
        uuid: Of the card or of a MIG slice, with or without its prefix `GPU-` or `MIG-`. A slice
            has no temperature and no power of its own: its whole card is asked.
        nvml: The module `pynvml` or what answers like it; imported on first use if absent.
        clock: Seconds, never going back.
    """

    def __init__(
        self, uuid: str, *, nvml: Any = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.uuid = uuid
        self._nvml = nvml
        self._clock = clock
        self._handle: Any = None
        self._found = 0
        self._is_split = False
        self._gone: str | None = None
        self._looked_at: float | None = None
        self._silent: dict[tuple[Any, ...], tuple[float, str]] = {}

    @property
    def found(self) -> int:
        """How often the card was found: 2 and more once the driver went and came back."""
        return self._found

    @property
    def gone(self) -> str | None:
        """Why the card cannot be asked, as far as was tried; None while it can be."""
        return self._gone

    @property
    def is_split(self) -> bool:
        """Whether MIG splits the card, which then tells of all its slices together.

        Raises:
            NvmlGone: There is no card to ask.
        """
        self._connect()
        return self._is_split

    def ask(self, question: str, *arguments: int) -> Any:
        """Call NVML's function of that name with the card's handle and the arguments.

        Raises:
            NvmlSilence: It does not answer.
            NvmlGone: There is no card to ask.
        """
        self._connect()
        function = getattr(self._nvml, question, None)
        return self._answer((question, *arguments), function, *arguments)

    def ask_field(self, field: int) -> Any:
        """Return the number in one of NVML's numbered fields.

        Raises:
            NvmlSilence: It does not answer.
            NvmlGone: There is no card to ask.
        """
        self._connect()
        nvml = self._nvml

        def ask(handle: Any) -> Any:
            (value,) = nvml.nvmlDeviceGetFieldValues(handle, [field])
            if value.nvmlReturn != _SUCCESS:
                raise nvml.NVMLError(value.nvmlReturn)
            return getattr(value.value, _MEMBERS[value.valueType])

        is_known = hasattr(nvml, "nvmlDeviceGetFieldValues")
        return self._answer(("field", field), ask if is_known else None)

    def _answer(
        self, question: tuple[Any, ...], function: Callable[..., Any] | None, *arguments: int
    ) -> Any:
        since, reason = self._silent.get(question, (None, ""))
        if since is not None and self._clock() - since < _ASK_AGAIN_S:
            raise NvmlSilence(reason, lasting=True)
        if function is None:
            self._silent[question] = (self._clock(), "unknown to the installed pynvml")
            raise NvmlSilence("unknown to the installed pynvml", lasting=True)
        try:
            answer = function(self._handle, *arguments)
        except self._nvml.NVMLError as error:
            value, reason = getattr(error, "value", None), str(error)
            if value in _GONE:
                raise self._lost(reason) from None
            if value in _LASTING:
                self._silent[question] = (self._clock(), reason)
            raise NvmlSilence(reason, lasting=value in _LASTING) from None
        except (OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            # What ctypes and pynvml raise over answers that they cannot take apart.
            raise NvmlSilence(f"{type(error).__name__}: {error}", lasting=False) from None
        self._silent.pop(question, None)
        return answer

    def _connect(self) -> None:
        if self._handle is not None:
            return
        now = self._clock()
        if self._looked_at is not None and now - self._looked_at < _FIND_AGAIN_S:
            raise NvmlGone(self._gone or "not found")
        self._looked_at = now
        try:
            nvml = self._nvml = self._nvml or importlib.import_module("pynvml")
        except ImportError as error:
            raise self._lost(str(error)) from None
        try:
            self._find(nvml)
        except (nvml.NVMLError, OSError, AttributeError) as error:
            raise self._lost(str(error)) from None
        if self._gone is not None:
            _log.info("card %s answers NVML again", self.uuid)
        self._gone = None
        self._found += 1
        self._silent.clear()

    def _find(self, nvml: Any) -> None:
        nvml.nvmlInit()
        try:
            handle, is_slice = self._look_up(nvml)
        except nvml.NVMLError:
            self._shut_down()
            raise
        try:
            mode, _ = nvml.nvmlDeviceGetMigMode(handle)
            self._is_split = is_slice or bool(mode == nvml.NVML_DEVICE_MIG_ENABLE)
        except (nvml.NVMLError, AttributeError, TypeError, ValueError):
            # Cards that cannot be split say NotSupported.
            self._is_split = is_slice
        self._handle = handle

    def _look_up(self, nvml: Any) -> tuple[Any, bool]:
        """Return the handle of the whole card, and whether the UUID is one of its slices'."""

        def whole_of(part_uuid: str) -> tuple[Any, bool]:
            part = nvml.nvmlDeviceGetHandleByUUID(part_uuid)
            return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part), True

        if self.uuid.startswith("MIG-"):
            return whole_of(self.uuid)
        bare = self.uuid.removeprefix("GPU-")
        try:
            return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{bare}"), False
        except nvml.NVMLError as error:
            if bare != self.uuid:
                raise
            # torch gives UUIDs without prefix, a slice's too.
            with contextlib.suppress(nvml.NVMLError, AttributeError):
                return whole_of(f"MIG-{bare}")
            raise error

    def _lost(self, reason: str) -> NvmlGone:
        if self._handle is not None:
            self._handle = None
            self._shut_down()
        if self._gone is None:
            level = logging.WARNING if self._found else logging.INFO
            _log.log(level, "card %s does not answer NVML: %s", self.uuid, reason)
        self._gone = reason
        return NvmlGone(reason)

    def _shut_down(self) -> None:
        # NVML counts who uses it, and starts anew only after the last has left.
        with contextlib.suppress(self._nvml.NVMLError, AttributeError):
            self._nvml.nvmlShutdown()
