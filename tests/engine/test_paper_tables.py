"""The papers' rows in the tables of an evaluation: complete, in our units, and apart from what was measured."""

import pytest
from omegaconf import OmegaConf

from engine.config import compose, plain
from engine.errors import UserError
from engine.evaluation.paper_tables import PaperTable, paper_lines, read_paper_tables
from engine.metrics.registry import METRICS


def tables_of(table):
    return {t.title: t for t in read_paper_tables(plain(compose("evaluate", [f"table={table}"]))["paper_tables"])}


def test_values_are_in_the_units_of_our_figures():
    """The paper states the WER of Talker-T2AV as 0.055 in Table 1 and as 6.33 % in Table 4; we use per cent."""
    tables = tables_of("talker")
    joint, dubbing = (next(t for title, t in tables.items() if title.startswith(n)) for n in ("Table 1", "Table 4"))
    assert METRICS["cer"].figures["cer"].scale == 100
    assert METRICS["emotion_similarity"].figures["emotion_similarity"].scale == 1
    assert joint.rows["Talker-T2AV"][joint.columns.index("cer")] == 14.8
    assert dubbing.rows["Talker-T2AV"][dubbing.columns.index("emotion_similarity")] == 0.6826
    assert "duration_distance" not in dubbing.stated  # its DD has another definition
    hicodit = next(iter(tables_of("hicodit").values()))
    assert hicodit.rows["true speech"][hicodit.columns.index("speaker_similarity")] == 1.0  # a cosine, not per cent


def test_only_tables_with_a_measured_figure_are_printed():
    table = PaperTable("Table 9", ["wer", "frames/s"], {"one": [5.5, None], "two": [5.25, 24]})
    assert paper_lines([table], ["stoi"]) == []
    lines = paper_lines([table], ["wer"])
    assert lines == ["", "Table 9  WER % ↓  frames/s", "one         5.50         –", "two         5.25        24"]


def test_a_row_of_another_length_is_refused():
    config = OmegaConf.create({"Table 9": {"columns": ["wer", "stoi"], "rows": {"one": [1.0]}}})
    with pytest.raises(UserError, match="Table 9: one has 1 values for 2 columns"):
        read_paper_tables(config)
