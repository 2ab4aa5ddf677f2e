"""Training of LIA-X at toy size. Axes: B pairs, S side."""

import json
import shutil

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.evaluation.validation import Share, figures_of
from engine.media.video import write_video
from engine.metrics.picture import Reconstruction, reconstruction
from lia_x.augment import Augment, replace_wall
from lia_x.data import FramePairs, RealAndDrawn, held_out_frames, sample_frames
from lia_x.losses import Perceptual, pyramid_l1, region_weights, structural, unexplained
from lia_x.task import LiaXTask
from tests.releases import write_release
from tests.tiny import LIA_X

WEIGHTS = {"l1": 10.0, "structural": 1.0, "perceptual": 0.0, "adversarial": 1.0, "sparsity": 0.01}
PLAIN = WEIGHTS | {"adversarial": 0.0}
BOX = {"left": 0.25, "top": 0.5, "right": 0.75, "bottom": 1.0}


def make_task(**changes):
    torch.manual_seed(0)
    arguments = {"codec": LIA_X, "weights": WEIGHTS, "pyramid": 2, "discriminator": {"width": 4, "max_width": 8}}
    return LiaXTask(**(arguments | changes))


def moving_square(frames: int, size: int = 32) -> np.ndarray:
    """(T, S, S, 3) bytes: a bright square that moves down a grey picture."""
    video = np.full((frames, size, size, 3), 90, np.uint8)
    for t in range(frames):
        top = 4 + t * (size - 16) // frames
        video[t, top : top + 8, 12:20] = (230, 200, 40)
    return video


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    rows = []
    for i, frames in enumerate((10, 3)):
        write_video(root / "train" / f"c{i}.mp4", moving_square(frames), 25)
        rows.append({"id": f"c{i}", "mouth": {"open": [t / 10 for t in range(frames)], "width": [-1.0] * frames}})
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def batch(pairs=2):
    video = torch.from_numpy(moving_square(2 * pairs))
    return {"frames": video.view(pairs, 2, *video.shape[1:])}


def test_pairs_come_from_the_cache_and_are_functions_of_the_generator(corpus, tmp_path):
    data = FramePairs(corpus, 32, tmp_path, frames=5)
    assert data.pictures.shape == (2, 5, 32, 32, 3)
    (cached,) = tmp_path.glob("*.npy")
    stamp = cached.stat().st_mtime_ns
    again = FramePairs(corpus, 32, tmp_path, frames=5)
    assert cached.stat().st_mtime_ns == stamp
    one, same = (pairs.load(0, torch.Generator().manual_seed(3))["frames"] for pairs in (data, again))
    other = data.load(0, torch.Generator().manual_seed(5))["frames"]
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one[0], one[1])


def test_a_replaced_clip_is_decoded_again_and_an_unreadable_one_is_reported(corpus, tmp_path, capsys):
    root = tmp_path / "corpus"
    shutil.copytree(corpus, root)
    first = FramePairs(root, 32, tmp_path / "cache", frames=5)
    write_video(root / "train" / "c0.mp4", 255 - moving_square(12), 25)
    again = FramePairs(root, 32, tmp_path / "cache", frames=5)
    assert np.abs(again.pictures[0].astype(int) - first.pictures[0]).mean() > 50
    (root / "train" / "c1.mp4").write_bytes(b"no video")
    for _ in range(2):
        assert len(FramePairs(root, 32, tmp_path / "cache", frames=5)) == 1
        assert "without 1 unreadable clips of 2" in capsys.readouterr().err


def test_tracks_belong_to_the_frames(corpus, tmp_path):
    data = FramePairs(corpus, 32, tmp_path, frames=5, tracks={"width": 1.0, "open": 2.0})
    item = data.load(0, torch.Generator().manual_seed(3))
    assert item["tracks"].shape == (2, 2) and (item["tracks"][:, 0] == -1).all()
    tops = [int(frame[:, 16, 0].argmax()) for frame in item["frames"]]  # of the square, which moves 1.6 pixels a frame
    assert tops == pytest.approx([4 + 8 * float(value) for value in item["tracks"][:, 1]], abs=1.5)
    assert data.collate([item, item])["tracks"].shape == (2, 2, 2)
    with pytest.raises(UserError, match="nose"):
        FramePairs(corpus, 32, tmp_path, frames=5, tracks={"nose": 1.0})


def test_sampled_frames_spread_over_the_clip_and_repeat_in_short_ones(corpus):
    frames = sample_frames(corpus / "train" / "c0.mp4", 5, 32, shift=0.0)
    truth = moving_square(10)[::2]
    assert np.abs(frames.astype(int) - truth).mean() < 8
    short = sample_frames(corpus / "train" / "c1.mp4", 5, 16, shift=0.0)
    assert short.shape == (5, 16, 16, 3) and np.array_equal(short[0], short[1])


def test_movement_is_compared_without_the_texture_of_the_source():
    task = make_task(weights=WEIGHTS | {"movement": 1.0})
    pairs = batch()
    task(pairs, "generator")
    real = pairs["_run"].real
    still = pairs["_run"].still
    frames = real[[1, 0, 3, 2]]
    encoder = task.codec.encoder
    decoder = task.codec.decoder
    with torch.no_grad():
        style, maps = encoder(frames)
        expected = decoder(decoder.navigate(style, encoder.motion(frames)), maps)
    torch.testing.assert_close(still.detach(), expected, rtol=1e-3, atol=1e-4)
    assert unexplained(torch.zeros_like(real), real - frames, task.region) == pytest.approx(1, abs=0.05)
    assert unexplained(real - frames, real - frames, task.region) == 0


def test_training_begins_at_low_resolution_and_with_guided_codes():
    task = make_task(weights=PLAIN, growth={"levels": 1, "until": 2}, guide={"weight": 2.0, "until": 1})
    first = batch() | {"tracks": torch.zeros(2, 2, 3)}
    losses = task(first, "generator")
    fake = first["_run"].fake
    motion = first["_run"].motion
    assert fake.shape == (4, 3, 16, 16)
    assert losses["guide"] == pytest.approx(motion[:, :3].square().mean().item())
    task.begin_step(1)
    ones = batch() | {"tracks": torch.ones(2, 2, 3)}
    assert "guide" not in task(ones, "generator")
    task.begin_step(2)
    third = batch()
    task(third, "generator")
    assert third["_run"].fake.shape == (4, 3, 32, 32)


def test_unknown_movements_are_not_supervised():
    task = make_task(weights=PLAIN, guide={"weight": 2.0, "until": 1})
    known = torch.full((2, 2, 1), torch.nan)
    known[0] = 0.0
    first = batch() | {"tracks": known}
    losses = task(first, "generator")
    assert losses["guide"] == pytest.approx(first["_run"].motion[:2, 0].square().mean().item())
    losses["loss"].backward()
    assert all(value.grad is None or value.grad.isfinite().all() for value in task.codec.parameters())
    unknown = batch() | {"tracks": torch.full((2, 2, 1), torch.nan)}
    assert task(unknown, "generator")["guide"] == 0


def test_the_codes_that_movements_supervise_can_be_chosen():
    task = make_task(weights=PLAIN, guide={"weight": 2.0, "until": 1, "codes": [0, 3]})
    moved = batch() | {"tracks": torch.zeros(2, 2, 2)}
    losses = task(moved, "generator")
    assert losses["guide"] == pytest.approx(moved["_run"].motion[:, [0, 3]].square().mean().item())
    with pytest.raises(UserError, match=r"task\.guide\.codes=\[0, 3\]: the data has 3 movements"):
        task(batch() | {"tracks": torch.zeros(2, 2, 3)}, "generator")
    with pytest.raises(UserError, match=r"task\.guide needs the movements of data\.train"):
        task(batch(), "generator")
    with pytest.raises(UserError, match=r"task\.guide\.codes=4"):
        make_task(weights=PLAIN, guide={"weight": 2.0, "until": 1, "codes": [4]})
    for codes in ([], [1, 1], 1):
        with pytest.raises(UserError, match="list different motion codes"):
            make_task(weights=PLAIN, guide={"weight": 2.0, "until": 1, "codes": codes})


def test_a_start_from_a_release_keeps_all_levels(tmp_path):
    write_release(make_task(weights=PLAIN), tmp_path / "release")
    task = make_task(weights=PLAIN, init=str(tmp_path / "release"), growth={"levels": 1, "until": 9})
    assert all(level.to_rgb.conv.weight.any() for level in task.codec.decoder.levels)
    both = batch()
    task(both, "generator")
    assert both["_run"].fake.shape == (4, 3, 32, 32)


def test_decoder_only_training_keeps_the_codes_of_a_release(the_decoder_alone_goes_on_from_a_release):
    sizes = LIA_X | {"depth": 2}
    picture = torch.rand(1, 3, 32, 32)
    the_decoder_alone_goes_on_from_a_release(make_task, batch(), picture, sizes, "depth=1")


def test_a_frozen_encoder_sees_the_frames_in_their_own_colours(tmp_path):
    write_release(make_task(weights=PLAIN), tmp_path / "release")
    for frozen in (True, False):
        task = make_task(weights=PLAIN, init=str(tmp_path / "release"), decoder_only=frozen)
        pairs = batch()
        pairs["views"] = 255 - pairs["frames"]
        task(pairs, "generator")
        shown = pairs["frames"] if frozen else pairs["views"]
        with torch.no_grad():
            expected = task.codec.encoder.motion(shown.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1)
        torch.testing.assert_close(pairs["_run"].motion.detach(), expected, rtol=1e-4, atol=1e-5)


def test_validation_measures_held_out_clips(corpus, tmp_path, shares_give_the_same_figures):
    task = make_task(validation={"root": str(corpus), "splits": ["train"], "clips": 2}).eval()
    results = figures_of([task.measure(tmp_path, Share())])
    assert set(results) == {f"train/{name}" for name in Reconstruction.figures}
    shares_give_the_same_figures(task)
    _, frames = next(held_out_frames(corpus, "train", 1, 32, Share()))
    assert np.abs(frames.astype(int) - moving_square(10)).mean() < 8
    assert figures_of([make_task().measure(tmp_path, Share())]) == {}


def test_reconstruction_metrics_of_known_clips():
    true = moving_square(10)
    same = reconstruction(true, true.copy())
    assert "psnr" not in same and same["ssim"] == pytest.approx(1) and same["mouth_movement"] == 1
    mean = np.repeat(true.mean(0, keepdims=True).round().astype(np.uint8), len(true), 0)
    assert reconstruction(true, mean)["mouth_movement"] == pytest.approx(0, abs=0.01)


def test_regions_have_a_larger_weight_in_the_losses():
    weights = region_weights(32, [BOX | {"weight": 5.0}])
    assert weights.mean() == pytest.approx(1) and weights[0, 0, 20, 16] == pytest.approx(5 * weights[0, 0, 0, 0].item())
    real = torch.zeros(1, 3, 32, 32)
    inside = torch.zeros(1, 3, 32, 32)
    outside = torch.zeros(1, 3, 32, 32)
    inside[..., 18:28, 10:20] = 1.0
    outside[..., 2:12, 10:20] = 1.0
    assert pyramid_l1(inside, real, weights, 3) == pytest.approx(5 * pyramid_l1(outside, real, weights, 3).item())
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert structural(noise, noise, weights) == pytest.approx(0, abs=1e-5)
    assert structural(noise, noise.flip(-1), weights) > 0.5
    flat = 0.9 + 0.01 * noise  # small differences of large values, which bfloat16 does not hold
    exact = structural(flat, flat.flip(-1), weights)
    with torch.autocast("cpu", torch.bfloat16):  # which changes all operations that can use TF32 on a GPU
        assert structural(flat, flat.flip(-1), weights) == exact


def test_perceptual_loss_takes_torchvision_weights(tmp_path):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        sizes = {k: v.shape for k, v in models.vgg19().state_dict().items() if k.startswith("features.")}
    torch.manual_seed(0)
    state = {k: torch.randn(size) / max(1, size[1:].numel()) ** 0.5 for k, size in sizes.items()}
    torch.save(state, tmp_path / "vgg19.pth")
    loss = Perceptual(tmp_path / "vgg19.pth")
    x = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    value = loss(x, torch.zeros(1, 3, 32, 32), levels=2)
    value.backward()
    assert value > 0 and x.grad.abs().sum() > 0
    assert loss(x, x.detach(), levels=2) == 0


def test_codes_of_an_earlier_release_are_a_target_and_are_decoded(tmp_path):
    write_release(make_task(weights=PLAIN), tmp_path / "release")
    task = make_task(weights=PLAIN, keep={"release": str(tmp_path / "release"), "weight": 2.0})
    with torch.no_grad():
        task.codec.encoder.to_motion.bias.add_(0.5)  # codes leave those of the release by a half
    mixed = batch() | {"drawn": torch.tensor([True, False])}
    losses = task(mixed, "generator")
    assert losses["keep"] == pytest.approx(0.25, rel=1e-3)
    for level in task.codec.decoder.levels:  # until it has flow, no code changes the picture
        torch.nn.init.normal_(level.to_flow.conv.weight)
    frames = torch.rand(4, 3, 32, 32) * 2 - 1
    earlier = torch.full((4, LIA_X["motion_dim"]), 50.0)
    drawn = torch.tensor([[True], [True], [False], [False]])
    fake, _, motion = task._rebuild(frames, taught=(earlier, drawn))
    plain, _, same = task._rebuild(frames)
    assert torch.equal(motion, same) and not torch.allclose(fake[:2], plain[:2], atol=1e-3)
    torch.testing.assert_close(fake[2:], plain[2:])


def test_codes_of_people_are_kept_by_a_codec_of_another_width(tmp_path):
    """They are those of the views, from which motion is encoded, too."""
    write_release(make_task(weights=PLAIN), tmp_path / "release")
    keep = {"release": str(tmp_path / "release"), "weight": 2.0}
    frames = batch()
    people = frames | {"views": 255 - frames["frames"], "drawn": torch.tensor([False, False])}

    def distance(codec=LIA_X, **more):
        task = make_task(weights=PLAIN, codec=codec, keep=keep | more)
        return float(task(dict(people), "generator")["keep"])

    wider = LIA_X | {"width": 2 * LIA_X["width"]}
    assert distance(people=True) == pytest.approx(0, abs=1e-5)  # the same weights, and the same codes
    assert distance(wider, people=True) > 0 and distance(wider) == 0
    with pytest.raises(UserError, match=r"task\.keep needs data with real and cartoon faces"):
        make_task(weights=PLAIN, keep=keep)(batch(), "generator")
    with pytest.raises(UserError, match=r"has motion_dim=4, but task\.codec requires 3"):
        make_task(weights=PLAIN, codec=LIA_X | {"motion_dim": 3}, keep=keep)


def test_motion_is_read_from_views():
    task = make_task().eval()
    frames, views = torch.rand(2, 4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        *_, motion = task._rebuild(frames, views)
        torch.testing.assert_close(motion, task.codec.encoder.motion(views), rtol=1e-4, atol=1e-5)


def test_real_faces_are_changed_and_drawn_ones_are_not(corpus, tmp_path, monkeypatch):
    drawn, people = (FramePairs(corpus, 32, tmp_path, frames=5) for _ in range(2))
    monkeypatch.setattr(people, "speakers", lambda: ["a", "b"])
    data = RealAndDrawn(drawn, people, 32, [BOX | {"weight": 5.0}], people_repeats=2, moving=2.0)
    items = [data.load(index, torch.Generator().manual_seed(index)) for index in range(len(data))]
    assert [bool(item["drawn"]) for item in items] == [True, True, False, False, False, False]
    assert torch.equal(items[0]["frames"], items[0]["views"]) and not torch.equal(items[2]["frames"], items[2]["views"])
    again = data.load(2, torch.Generator().manual_seed(2))
    torch.testing.assert_close(items[2], again, rtol=0, atol=0, equal_nan=True)
    assert all(item["weights"].mean() == pytest.approx(1, abs=1e-3) for item in items[:3])
    assert not any("tracks" in item for item in items)
    guided = FramePairs(corpus, 32, tmp_path, frames=5, tracks={"open": 2.0, "width": 1.0})
    assert RealAndDrawn(guided, people, 32).load(2)["tracks"].isnan().all()
    people.movements = ["width", "open"]
    with pytest.raises(
        UserError, match=r"people\.tracks=\['width', 'open'\]: set the same movements in the same order"
    ):
        RealAndDrawn(guided, people, 32)
    assert data.collate(items)["views"].shape == (6, 2, 32, 32, 3)


def test_people_with_few_clips_repeat_as_often_as_those_with_many(corpus, tmp_path, monkeypatch):
    pairs = FramePairs(corpus, 32, tmp_path, frames=5)
    people = FramePairs(corpus, 32, tmp_path, frames=5)
    monkeypatch.setattr(people, "speakers", lambda: ["a", "a", "a", "b"])
    kept = RealAndDrawn(pairs, people, 32).items
    assert sorted(index for source, index in kept if source is people) == [0, 1, 2, 3, 3, 3]


def test_a_blue_wall_is_replaced_and_a_face_is_not():
    frames = np.full((2, 32, 32, 3), (40, 150, 220), np.uint8)  # the wall
    frames[:, 8:24, 8:24] = (200, 150, 120)
    changed = replace_wall(frames, np.random.default_rng(0))
    assert np.abs(changed[:, 12:20, 12:20].astype(int) - (200, 150, 120)).max() <= 1
    assert np.abs(changed[:, 2:5, 2:5].astype(int) - (40, 150, 220)).mean() > 20
    assert np.array_equal(changed[0], changed[1])


def test_a_pair_is_changed_in_one_way():
    still = np.repeat(moving_square(1), 2, 0)
    augment = Augment()
    rng = np.random.default_rng(1)
    moved, _ = augment.frame(still, 32, rng)
    coloured = augment.recolour(moved, rng)
    assert np.array_equal(coloured[0], coloured[1]) and not np.array_equal(coloured[0], still[0])
    nothing = Augment(background=0, zoom=0, aspect=0, shift=0, bend=0, turn=0, flip=0, colour=0)
    same, _ = nothing.frame(still, 32, rng)
    assert np.array_equal(nothing.recolour(same, rng), still)
