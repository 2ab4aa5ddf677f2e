"""The papers' rows in the tables of an evaluation: complete, in our units, and apart from what was measured."""

import pytest
from omegaconf import OmegaConf

from engine.config import compose, plain
from engine.errors import UserError
from engine.evaluation.paper_tables import PaperTable, paper_lines, read_paper_tables
from engine.metrics.registry import METRICS


def tables_of(table):
    return {t.title: t for t in read_paper_tables(plain(compose("evaluate", [f"table={table}"]))["paper_tables"])}


def test_the_talker_shows_all_six_tables_of_its_paper():
    tables = tables_of("talker")
    numbers = [title.split(",")[0] for title in tables]
    assert numbers == ["Table 1"] * 2 + ["Table 2"] + ["Table 3"] * 2 + ["Table 4", "Table 5", "Table 6"]
    assert [len(table.rows) for table in tables.values()] == [6, 6, 10, 6, 6, 6, 7, 5]
    assert tables_of("codec").keys() < tables.keys()


def test_hicodit_shows_all_systems_and_ablations_of_its_paper():
    tables = tables_of("hicodit")
    numbers = [title.split(",")[0] for title in tables][:-1]
    assert numbers == [f"Table {n}" for n in (1, 2, 3, 4, 5, 5, 6, 7)]
    assert [len(table.rows) for table in tables.values()] == [10, 10, 4, 4, 3, 3, 3, 3, 2]
    first, second, _, _, on_lrs2, on_lrs3, _, visual, _ = tables.values()
    # the full model stands in the tables of results and in those of ablations
    assert list(on_lrs3.rows["HiCoDiT"]) == list(first.rows["HiCoDiT† (video)"])
    assert list(on_lrs2.rows["HiCoDiT"]) == list(second.rows["HiCoDiT† (video)"])
    full = dict(zip(first.columns, first.rows["HiCoDiT† (video)"]))
    assert list(visual.rows["HiCoDiT"]) == [full[name] for name in visual.columns]
    assert first.rows["true speech"][first.columns.index("speaker_similarity")] == 1.0  # a cosine, not per cent


def test_values_are_in_the_units_of_our_figures():
    """The paper has Talker's WER as 0.055 in Table 1 and as 6.33 % in Table 4; ours are per cent throughout."""
    tables = tables_of("talker")
    joint, dubbing = (next(t for title, t in tables.items() if title.startswith(n)) for n in ("Table 1", "Table 4"))
    assert METRICS["cer"].figures["cer"].scale == 100
    assert METRICS["emotion_similarity"].figures["emotion_similarity"].scale == 1
    assert joint.rows["Talker-T2AV"][joint.columns.index("cer")] == 14.8
    assert dubbing.rows["Talker-T2AV"][dubbing.columns.index("emotion_similarity")] == 0.6826
    assert "duration_distance" not in dubbing.stated  # its DD is defined in another way


def test_only_tables_with_a_measured_figure_are_printed_in_the_terminal():
    table = PaperTable("Table 9", ["wer", "frames/s"], {"one": [5.5, None], "two": [5.25, 24]})
    assert paper_lines([table], ["stoi"]) == []
    lines = paper_lines([table], ["wer"])
    assert lines == ["", "Table 9  WER % ↓  frames/s", "one         5.50         –", "two         5.25        24"]


def test_a_row_of_another_length_is_refused():
    config = OmegaConf.create({"Table 9": {"columns": ["wer", "stoi"], "rows": {"one": [1.0]}}})
    with pytest.raises(UserError, match="Table 9: one has 1 values for 2 columns"):
        read_paper_tables(config)
