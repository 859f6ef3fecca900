"One reader for the real MultiCamVideo layout and for ours: round trips, the condition, and every kind of damage."
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("camflow.media.video")
from camflow.data.multicam import MultiCamVideo, UnpairedVideos, clip_indices, read_captions  # noqa: E402
from camflow.files import InputError  # noqa: E402
from camflow.geometry.camera import Cameras  # noqa: E402
from camflow.media.frames import Frames  # noqa: E402
from camflow.world.render import render_clips  # noqa: E402
from camflow.world.write import FOCALS, read_world, scene_paths, write_captions, write_multicam, write_scene  # noqa: E402

REAL = Path(__file__).parents[2] / "shared" / "real" / "recammaster"
FOCAL = "f24_aperture5"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("multicam")
    write_multicam(root, scenes=2, frames=17, cameras=3, size=(80, 80), val=True, lossless=True)
    return root


@pytest.fixture
def root(written, tmp_path):
    "A copy to damage."
    shutil.copytree(written, tmp_path / "set")
    return tmp_path / "set"


def edit(root, change, scene="scene1"):
    path = root / "train" / FOCAL / scene / "cameras" / "camera_extrinsics.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_layout_is_the_published_one(written):
    files = {str(p.relative_to(written)) for p in written.rglob("*") if p.is_file()}
    assert {f"train/{FOCAL}/scene2/videos/cam03.mp4", f"train/{FOCAL}/scene1/cameras/camera_extrinsics.json", "metadata.csv",
            "val/10basic_trajectories/videos/cam10.mp4", "val/10basic_trajectories/cameras/camera_extrinsics.json"} <= files
    data = json.loads((written / f"train/{FOCAL}/scene1/cameras/camera_extrinsics.json").read_text())
    assert list(data)[:2] == ["frame0", "frame1"] and len(data) == 17 and list(data["frame0"]) == ["cam01", "cam02", "cam03"]
    text = data["frame5"]["cam02"]
    assert text.startswith("[") and text.endswith("] ") and text.count("] [") == 3 and text.split()[-1] == "1]"


def test_frames_poses_and_condition_of_a_pair(written):
    data = MultiCamVideo(written)
    assert data.scenes == ["scene1", "scene2"] and len(data.pairs) == 12 and data.pairs[0] == ("scene1", "cam01", "cam02")
    item = data.load("scene2", "cam02", "cam03", frames=9, size=(48, 80), start=3)
    scene, fps = read_world(data.scene_folders["scene2"])
    paths = scene_paths(scene, 3, 17)
    K = np.array([[24 / 23.76 * 80, 0, 40], [0, 24 / 23.76 * 80, 40], [0, 0, 1]])
    clips = render_clips(scene, [(np.asarray(p), K) for p in paths], np.arange(17) / fps, (80, 80))
    assert item.indices == list(range(3, 12)) and item.source_cameras.frames.tolist() == item.indices
    assert (item.source.data.numpy() == clips[1, 3:12, :, 16:64]).all() and (item.target.data.numpy() == clips[2, 3:12, :, 16:64]).all()
    relative = torch.linalg.inv(paths[1][3]) @ paths[2][3:12:4]
    assert item.camera.dtype == torch.float32 and torch.allclose(item.camera, relative[:, :3].flatten(1).float(), atol=1e-5)
    assert item.target_cameras.K[0, 1, 2] == 24 and abs(item.target_cameras.K[0, 0, 0] - 24 / 23.76 * 80) < 1e-9
    assert item.caption == scene.caption() and item.ids == ("cam02", "cam03")


def test_a_moving_source_enters_only_through_its_first_pose(written):
    item = MultiCamVideo(written).load("scene1", "cam01", "cam02", start=4)
    own = item.target_cameras.embedding(None, [0, 4, 8])
    assert not torch.allclose(item.camera[0], own[0]) and torch.allclose(own[0], torch.eye(4)[:3].flatten())


def test_stride_none_spans_the_video_and_poses_follow(written):
    item = MultiCamVideo(written).load("scene1", "cam01", "cam02", frames=9, stride=None)
    assert item.indices == [0, 2, 4, 6, 8, 10, 12, 14, 16] == item.target_cameras.frames.tolist()


def test_validation_folder_holds_the_ten_presets(written):
    from camflow.geometry.trajectory import PRESETS, preset
    data = MultiCamVideo(written, "10basic_trajectories")
    assert len(data.videos("10basic_trajectories")) == 10 and data.load("10basic_trajectories", "cam01", "cam05").caption == ""
    for i, name in enumerate(PRESETS):
        read = data.cameras("10basic_trajectories", f"cam{i + 1:02d}").relative(0).c2w
        assert torch.allclose(read, preset(name, 17), atol=1e-9), name


def test_focal_folders_and_the_other_caption_column(tmp_path):
    write_multicam(tmp_path, scenes=1, frames=5, cameras=2, size=(80, 80), focals=("f50_aperture2.4",), column="filename", val=False)
    item = MultiCamVideo(tmp_path, "f50_aperture2.4").load("scene1", "cam01", "cam02", frames=5, size=(48, 80))
    assert abs(item.target_cameras.K[0, 0, 0] - 50 / 23.76 * 80) < 1e-9 and item.caption.startswith("In a room")
    assert len(FOCALS) == 4


def test_scenes_sort_by_number_and_a_set_without_captions(root):
    (root / "train" / FOCAL / "scene2").rename(root / "train" / FOCAL / "scene10")
    (root / "metadata.csv").unlink()
    data = MultiCamVideo(root)
    assert data.scenes == ["scene1", "scene10"] and data.load("scene10", "cam01", "cam02").caption == ""


def drop_video(root): (root / "train" / FOCAL / "scene1/videos/cam02.mp4").unlink()


def cut_video(root):
    path = root / "train" / FOCAL / "scene1/videos/cam02.mp4"
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])


def shorter_video(root):
    scene, fps = read_world(root / "train" / FOCAL / "scene1")
    write_scene(root / "short", scene, scene_paths(scene, 3, 13), lossless=True)
    shutil.copy(root / "short/videos/cam02.mp4", root / "train" / FOCAL / "scene1/videos/cam02.mp4")


DAMAGE = {
    "missing video": (drop_video, "not there.*cam02.mp4"),
    "truncated video": (cut_video, "cam02.mp4"),
    "wrong frame count": (shorter_video, "13 frames, but 17 poses.*cam02.mp4"),
    "no camera": (lambda r: edit(r, lambda d: [d[f].pop("cam02") for f in d]), "cam02.*missing.*frame 0"),
    "no camera in one frame": (lambda r: edit(r, lambda d: d["frame7"].pop("cam02")), "cam02.*missing.*frame 7"),
    "no frame": (lambda r: edit(r, lambda d: d.pop("frame7")), "frame 7 is missing"),
    "NaN pose": (lambda r: edit(r, lambda d: d["frame3"].update(cam02=d["frame3"]["cam02"].replace(d["frame3"]["cam02"].split()[-2], "nan"))), "NaN.*frame 3"),
    "no caption": (lambda r: write_captions(r / "metadata.csv", {k: v for k, v in read_captions(r / "metadata.csv")[0].items() if "scene1/videos/cam02" not in k}),
                   "no caption.*scene1/videos/cam02.mp4"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_skipped_only_on_request(root, kind):
    damage, message = DAMAGE[kind]
    damage(root)
    with pytest.raises(InputError, match="(?s)" + message): MultiCamVideo(root).load("scene1", "cam01", "cam02")
    if kind == "missing video":                               # noticed before anything is loaded
        with pytest.raises(InputError, match="1 videos of the caption table.*scene1/videos/cam02.mp4"): MultiCamVideo(root)
    data = MultiCamVideo(root, skip_bad=True, decode=True)
    whole_scene = kind == "no frame"
    assert data.skipped and all(("scene1", "cam02") != (s, c) for s, a, b in data.pairs for c in (a, b))
    assert data.scenes == (["scene2"] if whole_scene else ["scene1", "scene2"]) and any("cam" in str(s) or "frame" in str(s) for s in data.skipped)
    for scene, source, target in data.pairs[:2]: data.load(scene, source, target)


def test_a_given_table_chooses_the_scenes(root):
    "As metadata-f24-train.csv does, beside metadata-f24-test.csv and without a metadata.csv; a caption that is missing within a scene is still an error."
    captions = read_captions(root / "metadata.csv")[0]
    (root / "metadata.csv").unlink()
    train, test = root / "metadata-f24-train.csv", root / "metadata-f24-test.csv"
    for table, scene in ((train, "scene2"), (test, "scene1")): write_captions(table, {k: v for k, v in captions.items() if f"/{scene}/" in k})
    data = MultiCamVideo(root, metadata=train)
    assert data.scenes == ["scene2"] and data.unlisted == ["scene1"] and not data.check() and not data.skipped and "1 not in the table" in str(data)
    assert MultiCamVideo(root, metadata=test, skip_bad=True).scenes == ["scene1"] and MultiCamVideo(root, metadata={}).scenes == ["scene1", "scene2"]
    with pytest.raises(InputError, match="no metadata.csv, but metadata-f24-test.csv, metadata-f24-train.csv.*metadata="): MultiCamVideo(root)
    write_captions(train, {k: v for k, v in captions.items() if "/scene2/" in k and "cam02" not in k})
    assert [(scene, camera) for scene, camera, _ in MultiCamVideo(root, metadata=train).check()] == [("scene2", "cam02")]
    write_captions(train, {k.replace("f24_aperture5", "f50_aperture2.4"): v for k, v in captions.items()})
    with pytest.raises(InputError, match="no row of .*train.csv is about a scene of .*f24_aperture5"): MultiCamVideo(root, metadata=train)


def test_caption_tables(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_text("file_name,text\na.mp4,one\n\n,\nb.mp4,two,three\nc.mp4,!!!!!!!!\nd.mp4,fine\n", encoding="utf-8")
    with pytest.raises(InputError, match="blank row.*row 3"): read_captions(path)
    captions, skipped = read_captions(path, skip_bad=True)
    assert captions == {"a.mp4": "one", "d.mp4": "fine"} and [f"row {n}" in s for n, s in zip((3, 4, 5, 6), skipped)] == [True] * 4
    path.write_text("name,text\na.mp4,one\n")
    with pytest.raises(InputError, match="row 1.*file_name"): read_captions(path)
    path.write_bytes("file_name,text\na.mp4,one\n".encode("utf-16"))
    with pytest.raises(InputError, match="UTF-8"): read_captions(path)


@pytest.mark.parametrize("raw, found", {
    "byte order mark": (b"\xef\xbb\xbffile_name,text\r\na.mp4,one\r\n\r\n\n", "one"), "semicolons": (b'file_name;text\na.mp4;"one; two, three"\n', "one; two, three"),
    "tabs": (b"file_name\ttext\na.mp4\tone, two\n", "one, two"), "Windows-1252": (b"file_name,text\na.mp4,f\xfcr dich\n", "für dich"),
    "GB18030": ("file_name,text\na.mp4,一个人在跳舞\n".encode("gb18030"), "一个人在跳舞"), "old Mac": (b"file_name,text\ra.mp4,one\r", "one"),
    "the same row twice": (b"file_name,text\na.mp4,one\na.mp4,one\n", "one"), "two texts": (b"file_name,text\na.mp4,one\na.mp4,two\n", "another text for a.mp4.*row 3"),
    "open quote": (b'file_name,text\na.mp4,"one\nb.mp4,two\n', "rows of other videos.*close its quote"),
}.values())
def test_caption_tables_of_spreadsheets(raw, found, tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_bytes(raw)
    if "row" in found:
        with pytest.raises(InputError, match=found): read_captions(path)
    else: assert read_captions(path)[0] == {"a.mp4": found}


def test_wrong_requests(written, tmp_path):
    data = MultiCamVideo(written)
    with pytest.raises(InputError, match="4k \\+ 1"): data.load("scene1", "cam01", "cam02", frames=8)
    with pytest.raises(InputError, match="17 there"): data.load("scene1", "cam01", "cam02", frames=21)
    with pytest.raises(InputError, match="no scene 'scene9'"): data.load("scene9", "cam01", "cam02")
    with pytest.raises(InputError, match="no folder"): MultiCamVideo(written, "f35_aperture2.4")
    with pytest.raises(InputError, match="no folder"): MultiCamVideo(tmp_path / "nowhere")
    assert clip_indices(5, 5) == [0, 1, 2, 3, 4]


def test_unpaired_videos(root):
    folder = root / "train" / FOCAL / "scene1/videos"
    write_captions(folder / "metadata.csv", {"cam01.mp4": "a dance", "gone.mp4": "not here"})
    (folder / "cam02.mp4").write_bytes(b"no video")
    clips = UnpairedVideos(folder)
    assert clips.names == ["cam01.mp4", "cam02.mp4", "cam03.mp4"] and clips.absent == ["gone.mp4"]
    item = clips.load("cam01.mp4", size=(48, 80), stride=None)
    assert isinstance(item.source, Frames) and item.source.size == (48, 80) and item.caption == "a dance" and item.indices[-1] == 16
    with pytest.raises(InputError, match="cam02.mp4"): clips.load(1)
    kept = UnpairedVideos(folder, skip_bad=True)
    assert kept.names == ["cam01.mp4", "cam03.mp4"] and kept.skipped[0][0] == "cam02.mp4"
    with pytest.raises(InputError, match="no videos"): UnpairedVideos(root / "train")


@pytest.mark.skipif(not REAL.exists(), reason="the real ReCamMaster test files are not here")
def test_real_files():
    captions, skipped = read_captions(REAL / "metadata-f24-test.csv")
    assert len(captions) == 50 and not skipped and any("\u2019s" in text for text in captions.values())
    clips = UnpairedVideos(REAL, frames=81)
    assert len(clips) == 4 and len(clips.absent) == 6
    item = clips.load("9.mp4", size=(48, 80))
    assert len(item.source) == 81 and item.caption
    cameras = Cameras.from_unreal_json(REAL / "cameras/camera_extrinsics.json", "cam05")
    assert len(cameras) == 81 and abs(float(cameras.relative(0).c2w[-1, 2, 3]) - 1.988) < 1e-3
