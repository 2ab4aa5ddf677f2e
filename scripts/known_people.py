"""Add people.json, a description of the training people, to a release, so that unknown faces cause a remark:

python scripts/known_people.py SHARDS RELEASE
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

from pathlib import Path

from engine.arguments import Parser, existing_folder
from engine.errors import run_cli
from engine.shards.reader import ShardSplit
from hicodit.people import FILE, KnownPeople, face_features


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("shards", type=Path, help="folder of prepared splits with faces; train is read")
    parser.add_argument("release", type=existing_folder, help="release folder that gets people.json")
    args = parser.parse_args()
    clips = ShardSplit(args.shards / "train")
    clips.require("faces")
    features = []
    speakers = []
    for number in range(len(clips)):
        info, tensors = clips.read(number, ("faces",))
        features.append(face_features(tensors["faces"].numpy()))
        speakers.append(str(info["speaker"]))
    KnownPeople.from_clips(features, speakers).save(args.release)
    print(f"{args.release / FILE}: {len(set(speakers))} people of {len(clips)} clips")


if __name__ == "__main__":
    run_cli(main)
