"""What stands beside the accuracy of a defense that rejects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from robustbench_lite.attacks import FGSM, PGD
from robustbench_lite.core.models import ABSTAIN
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import Dataset, load_data
from robustbench_lite.defenses import Detector
from robustbench_lite.evaluation import Store, evaluate, summarize
from robustbench_lite.evaluation.detection import area_under_curve
from robustbench_lite.evaluation.scan import scan
from robustbench_lite.zoo import load_defense

LINF = Lp("linf", 0.1)
SCORES = st.lists(st.integers(0, 5), min_size=1, max_size=30)  # many ties


class Unsure(Detector):
    """Rejects where the largest probability is small."""

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.net(x)
        return logits, 1 - logits.softmax(dim=1).amax(dim=1)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_data("digits").head(60)


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    found = Unsure(load_defense("digits/standard"), fpr=0.1)
    found.calibrate(load_data("digits", "calibration"))
    return found.eval()


@given(SCORES, SCORES)
def test_area_under_curve(clean: list[int], attacked: list[int]) -> None:
    marks = [0] * len(clean) + [1] * len(attacked)
    expected = roc_auc_score(marks, clean + attacked)
    assert area_under_curve(np.array(clean, float), np.array(attacked, float)) == pytest.approx(expected, abs=1e-12)


def test_area_of_nothing_is_refused() -> None:
    for clean, attacked in (([], [1.0]), ([1.0], []), ([1.0], [np.nan])):
        with pytest.raises(ValueError, match="without NaN on both sides"):
            area_under_curve(np.array(clean), np.array(attacked))


def test_coverage_and_area_beside_the_accuracies(detector: nn.Module, data: Dataset, tmp_path: Path) -> None:
    attacks = [FGSM(), PGD(steps=5)]
    report = evaluate(detector, data, LINF, attacks, store=tmp_path)
    row = report.summary().iloc[0]
    with torch.no_grad():
        assert row["coverage"] == (detector.predict(data.images) != ABSTAIN).double().mean()
        clean = detector.answer(data.images)[1].numpy()
    assert 0.5 < row["coverage"] < 1
    areas = []
    for attack in attacks:
        found = attack(detector, data.images, data.labels, LINF, indices=data.indices)
        with torch.no_grad():
            wrong = detector.predict(found.x_adv) != data.labels
            areas.append(
                roc_auc_score([0] * 60 + [1] * int(wrong.sum()), [*clean, *detector.answer(found.x_adv)[1][wrong]])
            )
    assert row["auc"] == pytest.approx(min(areas), abs=1e-6)
    assert abs(areas[0] - areas[1]) > 1e-4  # the least of them is meant
    stored = scan(tmp_path).table.iloc[0]
    assert (stored["coverage"], stored["auc"]) == (row["coverage"], row["auc"])


def test_others_have_none(data: Dataset) -> None:
    row = evaluate(load_defense("digits/standard"), data.head(10), LINF, [FGSM()]).summary().iloc[0]
    assert np.isnan(row["coverage"])
    assert np.isnan(row["auc"])


def test_files_that_are_older_than_the_column(detector: nn.Module, data: Dataset, tmp_path: Path) -> None:
    before = evaluate(detector, data.head(10), LINF, [FGSM()], store=tmp_path).summary().iloc[0]
    for path in tmp_path.glob("cells/*/*.parquet"):
        rows = pq.read_table(path)
        pq.write_table(rows.drop_columns(["suspicion"]), path, write_page_checksum=True)
    store = Store(tmp_path)
    table = summarize(store.records()).iloc[0]
    assert store.warnings == []
    assert table["worst_case"] == before["worst_case"]
    assert np.isnan(table["auc"])
    assert np.isnan(scan(tmp_path).table.iloc[0]["auc"])
