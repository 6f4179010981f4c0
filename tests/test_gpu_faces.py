"""bench/gpu_faces.py: its whole path on a CPU with tiny sizes, and the shape that it measures."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_whole_path_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a script, from elsewhere, as it is copied to a machine with a GPU."""
    script = str(ROOT / "bench/gpu_faces.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--tiny", "--json", "out.json"])
    runpy.run_path(script, run_name="__main__")
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(figures)
    assert (figures["shape"], figures["size_px"], figures["batch"], figures["target"]) == ("tiny", 64, 4, 1500)
    assert min(figures["network"], figures["decode"], figures["path"]) > 0
    assert 20 <= figures["boxes"] <= 20 * 8  # of 5 batches of 4 pictures: 1 at least and 8 at most of each


def test_the_network_has_the_shape_of_scrfd_10g() -> None:
    """10 thousand million multiplications at 640 x 480 and 4.23 million weights, as its authors say."""
    sys.path.insert(0, str(ROOT))
    from bench.gpu_faces import SCRFD_10G, Scrfd, multiplications

    network = Scrfd(SCRFD_10G).eval()
    assert multiplications(network, 640, 480) == pytest.approx(10e9, rel=0.01)
    assert sum(weights.numel() for weights in network.parameters()) == pytest.approx(4.23e6, rel=0.005)
