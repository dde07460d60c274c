"""Fits the thermal model to a recorded power step: on the heating part, judged on the cooling part.

The recorded power is the input, as it is: the card reports a mean of about the last second, so
within a second of an edge the temperature runs ahead of the reported power. That is most of the
error that is left, together with readings in whole degrees. It also drives the fast time constant
to the shortest that is looked for: all the recording says of it is that it is under a second. The
simulation's steps are no shorter, so there it is at once. A delay of the power as a sixth parameter
makes heating better (0.70 C RMS at 0.32 s) and the cooling that is to be predicted worse (1.41 C):
the two edges are not late by the same, so no one delay describes both, and none is fitted.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.simulation.thermal_model import Array, ThermalParameters, ThermalState
from serve.errors import ConfigurationError

RECORDED = Path(__file__).parents[1] / "data" / "h100_power_step.json"
FITTED = Path(__file__).parents[1] / "data" / "h100_thermal_model.json"
_MOST_RMS_C = 1.2
_SHORTEST_S = 0.05
_FULL_LOAD = 0.95  # of the highest power: above it the card is loaded
_ORDER = (
    "ambient_c",
    "die_resistance",
    "die_time_constant_s",
    "air_resistance",
    "air_time_constant_s",
)


@dataclass(frozen=True)
class PowerStep:
    """A recording: shape (readings,) each; seconds, degrees Celsius, watts."""

    at_s: Array
    temperature_c: Array
    power_w: Array

    @property
    def heating(self) -> int:
        """Number of readings up to the last one under full load."""
        loaded = np.flatnonzero(self.power_w >= _FULL_LOAD * self.power_w.max())
        return int(loaded[-1]) + 1


def read_power_step(path: Path = RECORDED) -> PowerStep:
    """Read a recording of temperature and power.

    Raises:
        ConfigurationError: It is none.
    """
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        places = [recorded["columns"].index(name) for name in ("t_s", "gpu_temperature_c")]
        places.append(recorded["columns"].index("power_w"))
        columns = np.array([[row[place] for place in places] for row in recorded["rows"]], float).T
        if columns.shape[1] < 2 or not np.all(np.diff(columns[0]) > 0):
            raise ValueError("times must rise")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigurationError(
            f"This is no recording of a power step: {error!r}", field="file", value=str(path)
        ) from error
    return PowerStep(*columns)


def predict(step: PowerStep, parameters: ThermalParameters) -> Array:
    """Return the model's temperature at each reading, from the first one's settled state."""
    state = ThermalState([parameters], step.power_w[:1])
    predicted = [state.temperature_c[0]]
    between = (step.power_w[1:] + step.power_w[:-1]) / 2
    for power, seconds in zip(between, np.diff(step.at_s), strict=True):
        state.advance(np.array([power]), float(seconds))
        predicted.append(state.temperature_c[0])
    return np.array(predicted)


def fit(step: PowerStep) -> ThermalParameters:
    """Return the parameters that are least squares off on the heating part."""
    from scipy.optimize import least_squares

    heating = step.heating
    part = PowerStep(step.at_s[:heating], step.temperature_c[:heating], step.power_w[:heating])
    guess = [part.temperature_c.min() - 4, 0.03, 1.0, 0.02, 15.0]
    lowest, highest = [0, 1e-4, _SHORTEST_S, 1e-4, 2.0], [60, 1, 10, 1, 600]
    found = least_squares(
        lambda values: predict(part, ThermalParameters(*values)) - part.temperature_c,
        guess,
        bounds=(lowest, highest),
        x_scale=guess,
    )
    return ThermalParameters(*(float(value) for value in found.x))


def report(path: Path = RECORDED) -> dict[str, Any]:
    """Fit a recording and return parameters, errors and the target; all of it JSON."""
    step = read_power_step(path)
    parameters = fit(step)
    error = predict(step, parameters) - step.temperature_c
    cooling = step.heating
    late = step.at_s >= step.at_s[cooling] + 2
    rms = _rms(error[cooling:])
    return {
        "parameters": {name: round(value, 5) for name, value in asdict(parameters).items()},
        "rms_heating_c": _rms(error[:cooling]),
        "rms_cooling_c": rms,
        "rms_cooling_after_2_s_c": _rms(error[late]),
        "worst_cooling_c": round(float(np.abs(error[cooling:]).max()), 2),
        "readings": {"heating": cooling, "cooling": len(step.at_s) - cooling},
        "source": path.name,
        "command": "kelvin simulate --fit --json",
        "targets": {
            "rms_cooling_c": {"at_most": _MOST_RMS_C, "is": rms, "met": rms <= _MOST_RMS_C}
        },
    }


def read_fitted(path: Path = FITTED) -> ThermalParameters:
    """Return the parameters that `report` found and that were kept in a file.

    Raises:
        ConfigurationError: It holds none.
    """
    try:
        parameters = json.loads(path.read_text(encoding="utf-8"))["parameters"]
        return ThermalParameters(*(float(parameters[name]) for name in _ORDER))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"This is no fitted thermal model: {error!r}", field="file", value=str(path)
        ) from error


def _rms(error: Array) -> float:
    return round(float(np.sqrt(np.mean(error**2))), 3)
