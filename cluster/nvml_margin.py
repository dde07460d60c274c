"""How many degrees a card has left before it slows itself down, by NVML.

What the margin is measured against, and why
--------------------------------------------
NVML describes software thermal slowdown (0x20) as clocks chosen so that "current GPU temperature
does not exceed GPU Max Operating Temperature" and "current memory temperature does not exceed
Memory Max Operating Temperature" (nvml.h, nvmlClocksEventReasonSwThermalSlowdown). So a card's
first limit is not the hardware's slowdown threshold but the maximum operating temperature below
it, of GPU or memory, whichever is nearer.

* Ada, Hopper and newer have a margin temperature, which nvidia-smi prints as `GPU T.Limit Temp`.
  From it is taken the margin at which they slow down: the larger of fields 196 (GPU maximum) and
  195 (memory maximum), 0 on every card seen. nvmlDeviceGetTemperatureThreshold is "no longer the
  preferred interface" there and its support is to be removed, so thresholds serve only under
  drivers that have no margin.
* Ampere and older have absolute thresholds: the smaller of GPU_MAX and SLOWDOWN less the GPU's
  temperature, and MEM_MAX less the memory's; the nearer of the two. SLOWDOWN counts because a card
  may tell a GPU_MAX above it.

The header calls the margin the "distance to nearest slowdown threshold". On H100s it was the nearer
of both maxima: 33 C with memory at 41 C gave 54 (87 - 33 = 95 - 41), 35 C with memory at 44 C gave
51 (95 - 44; 87 - 35 is 52). On L4s temperature and margin add up to 86 (33 + 53) and 84 (45 + 39),
so it counts a sensor that they do not tell; `Reading.limit_c` moves with it by some degrees.

What cards tell
---------------
| | H100 SXM | L4 | A10G | V100 SXM2 |
| --- | --- | --- | --- | --- |
| architecture | Hopper | Ada | Ampere | Volta |
| margin temperature | yes | yes | no | no |
| field 193, of shutdown | -8 | -5 | no | no |
| field 194, of slowdown | -2 | -2 | no | no |
| field 195, of the memory maximum | 0 | no | no | no |
| field 196, of the GPU maximum | 0 | 0 | no | no |
| threshold of shutdown | 95 C | ? | 98 C | 90 C |
| threshold of slowdown | 89 C | ? | 95 C | 87 C |
| threshold of the GPU maximum | 87 C | ? | 88 C | 83 C |
| threshold of the memory maximum | 95 C | ? | no | 85 C |
| memory temperature | yes | no | no | yes |
| power cap | 700 W | 72 W | 300 W | 300 W |
| power, SM clock, clocks-event reasons | yes | yes | yes | yes |
| total energy | yes | ? | ? | ? |

Sources: H100, asked through NVML in November 2026, and for the sums above two published outputs of
`nvidia-smi -q` (drivers 545.23.08 and one that still prints absolute thresholds); L4, A10G and V100
from published outputs of `nvidia-smi -q` (drivers 550.90.07 and 555.42.06, 535.247.01, 550.127.05),
which do not show total energy. NVML documents that counter for Volta and newer.
"""

from __future__ import annotations

from cluster.nvml_answers import HOTTEST_C, Questions, answer_or_none, number
from cluster.nvml_device import NvmlDevice, NvmlGone, NvmlSilence

_SLOWDOWN, _MEMORY_MAX, _GPU_MAX = 1, 2, 3  # nvmlTemperatureThresholds_t
_MEMORY_MAX_FIELD, _GPU_MAX_FIELD = 195, 196  # NVML_FI_DEV_TEMPERATURE_*_TLIMIT


def margin_c(
    device: NvmlDevice,
    temperature_c: float | None,
    memory_temperature_c: float | None,
    questions: Questions,
) -> float | None:
    """Return degrees Celsius to the card's first slowdown, below 0 beyond it; None if unknown.

    Raises:
        NvmlGone: There is no card to ask.
    """
    try:
        margin = number(device.ask("nvmlDeviceGetMarginTemperature"), -100.0, HOTTEST_C)
    except NvmlGone:
        raise
    except NvmlSilence as silence:
        if not silence.lasting:
            # The card has a margin, and so its thresholds may mean nothing.
            questions.leave_open("margin", str(silence))
            return None
    else:
        fields = (_field(device, _GPU_MAX_FIELD), _field(device, _MEMORY_MAX_FIELD))
        return margin - max((each for each in fields if each is not None), default=0.0)
    gpu_limit = _smallest(_threshold(device, _GPU_MAX), _threshold(device, _SLOWDOWN))
    memory_limit = _threshold(device, _MEMORY_MAX)
    nearer = _smallest(
        _difference(gpu_limit, temperature_c), _difference(memory_limit, memory_temperature_c)
    )
    if nearer is None:
        questions.leave_open("margin", "neither a margin nor a threshold with its temperature")
    return nearer


def _field(device: NvmlDevice, field: int) -> float | None:
    return answer_or_none(lambda: number(device.ask_field(field), -50.0, 50.0))


def _threshold(device: NvmlDevice, which: int) -> float | None:
    question = "nvmlDeviceGetTemperatureThreshold"
    return answer_or_none(lambda: number(device.ask(question, which), 1.0, HOTTEST_C))


def _smallest(*values: float | None) -> float | None:
    return min((each for each in values if each is not None), default=None)


def _difference(limit: float | None, temperature: float | None) -> float | None:
    return None if limit is None or temperature is None else limit - temperature
