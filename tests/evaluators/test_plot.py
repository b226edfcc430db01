from __future__ import annotations

import builtins
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamrec.errors import ConfigError
from streamrec.evaluators import Report, Window
from streamrec.evaluators.plot import _limits, plot_windows

NAMES = ("AUC", "NormalizedEntropy", "Calibration")


def report(n: int = 30, **values: float) -> Report:
    rng = np.random.default_rng(n)
    windows = [
        Window(
            1.7e9 + 3600 * k,
            1.7e9 + 3600 * (k + 1),
            3 if k == 0 else 500,
            {name: values.get(name, 0.8 + 0.1 * rng.random()) for name in NAMES},
        )
        for k in range(n)
    ]
    return Report({}, {}, windows)


def size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_it_draws_a_picture_of_readme_width(tmp_path: Path) -> None:
    plot_windows({"FM": report(), "logistic regression": report(25)}, tmp_path / "a.png", title="A title")
    assert size(tmp_path / "a.png") == (1200, 937)


@pytest.mark.parametrize("n", [1, 2, 300])
def test_any_number_of_windows_will_do(n: int, tmp_path: Path) -> None:
    report(n).plot(tmp_path / "a.png", metrics=["AUC", "Calibration"])
    assert size(tmp_path / "a.png")[0] == 1200


def test_undefined_values_are_left_out(tmp_path: Path) -> None:
    report(5, AUC=float("nan"), NormalizedEntropy=float("nan")).plot(tmp_path / "a.png")
    assert size(tmp_path / "a.png")[0] == 1200


def test_a_wild_first_window_does_not_set_the_scale() -> None:
    values = np.concatenate([[40.0, 9.0], np.linspace(0.9, 1.1, 100)])
    low, high = _limits(values, 1.0)
    assert 0.8 < low < 0.9
    assert 1.1 < high < 1.4
    assert _limits(np.array([]), 1.0) == (0.5, 1.5)
    low, high = _limits(np.array([0.5]), None)
    assert low < 0.5 < high


def test_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(ConfigError, match="window"):
        Report({}, {}).plot(path)
    with pytest.raises(ConfigError, match="min_count=1000"):
        report().plot(path, min_count=1000)
    with pytest.raises(ConfigError, match="no metric 'CTR'; it has AUC"):
        report().plot(path, metrics=["CTR"])
    with pytest.raises(ConfigError, match="at least one"):
        report().plot(path, metrics=[])
    assert not path.exists()


def test_without_matplotlib_it_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r'pip install "streamrec\[plot\]"'):
        report().plot(tmp_path / "a.png")


def test_it_touches_no_global_state(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from streamrec.evaluators import Report, Window\n"
        "import matplotlib\n"
        "names = [name for name in matplotlib.rcParams if name != 'backend']  # reading that one loads pyplot\n"
        "before = [matplotlib.rcParams[name] for name in names]\n"
        f"Report({{}}, {{}}, [Window(0., 60., 9, {{'AUC': .7}})]).plot({str(tmp_path / 'a.png')!r}, metrics=['AUC'])\n"
        "print('matplotlib.pyplot' in sys.modules, before == [matplotlib.rcParams[name] for name in names])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
