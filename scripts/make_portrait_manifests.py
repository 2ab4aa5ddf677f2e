"""Write the manifests with which Talker-T2AV is evaluated on people of GRID, for scripts/evaluate.py table=talker.

    python scripts/make_portrait_manifests.py --grid /data/grid --people s31 s32 s33 s34 --out outputs/portraits

sentences.jsonl contains the sentences of assets/demo/sentences.txt, spoken in turn in the voice and with the portrait
of each person. clips.jsonl contains all clips of each person, the input of a2v and v2a. Voice and portrait are never
from the clip that the output is compared with. The rows contain paths of GRID's files, which are not copied.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import json
from pathlib import Path

from corpora.preparation.sources_grid import grid_sentence
from engine.arguments import Parser, existing_folder
from engine.errors import UserError, run_cli
from engine.files import CHECKOUT, find_files, writable, write_text

SENTENCES = CHECKOUT / "assets" / "demo" / "sentences.txt"

Row = dict[str, str]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--grid", type=existing_folder, required=True, help="folder of GRID, with a folder per person")
    parser.add_argument("--people", nargs="+", required=True, help="names of the people's folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of the manifests")
    args = parser.parse_args()
    people = {person: clips_of(args.grid.resolve() / person) for person in args.people}
    with writable(args.out):
        for name, rows in (("sentences", sentence_rows(people)), ("clips", clip_rows(people))):
            target = args.out / f"{name}.jsonl"
            write_text(target, "".join(json.dumps(row) + "\n" for row in rows))
            print(f"{target}: {len(rows)} rows")


def clips_of(folder: Path) -> list[Path]:
    """Return the clips of a person, sorted by name.

    Raises:
        UserError: If there are fewer than two.
    """
    files = [folder / file for file in find_files(folder, ".mpg", ".mp4") if grid_sentence(file.stem)]
    if len(files) < 2:
        raise UserError(f"{folder} has {len(files)} clips with names of GRID, such as bbaf2n.mpg: two are needed")
    return files


def sentence_rows(people: dict[str, list[Path]]) -> list[Row]:
    """Return a row for each sentence. `reference` is another recording of the voice, to compare voices with."""
    names = list(people)
    rows = []
    for number, text in enumerate(SENTENCES.read_text().splitlines()):
        turn, person = divmod(number, len(names))
        clips = people[names[person]]
        given = str(clips[turn % len(clips)])
        other = str(clips[(turn + 1) % len(clips)])
        row = {"id": f"plain-{number:02d}", "text": text, "speaker": names[person]}
        rows.append(row | {"reference_audio": given, "reference_video": given, "reference": other})
    return rows


def clip_rows(people: dict[str, list[Path]]) -> list[Row]:
    """Return rows with all clips of each person. Voice and portrait are from the clip after it."""
    rows = []
    for person, clips in people.items():
        for number, clip in enumerate(clips):
            other = str(clips[(number + 1) % len(clips)])
            row = {"id": f"{person}-{clip.stem}", "text": grid_sentence(clip.stem), "speaker": person}
            row |= {"reference": str(clip), "video": str(clip), "reference_audio": other, "reference_video": other}
            rows.append(row)
    return rows


if __name__ == "__main__":
    run_cli(main)
