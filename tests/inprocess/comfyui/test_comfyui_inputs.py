"""Pictures that are uploaded by name, to start from."""

from __future__ import annotations

import io

import httpx
import pytest
from PIL import Image

from tests.inprocess.comfyui.caller import history, png, sent, uploaded, workflow
from tests.inprocess.stand_in_stages import StandIn


def test_a_start_image_is_uploaded_by_name(http: httpx.Client, stages: StandIn):
    kept = uploaded(http, "house.png", png(), subfolder="winter")
    assert kept == {"name": "house.png", "subfolder": "winter", "type": "input"}
    assert http.get("/view", params={"filename": kept["name"], **kept}).content == png()
    graph = workflow("image_to_image")
    graph["10"]["inputs"]["image"] = "winter/house.png"
    entry = history(http, sent(http, graph))
    (job,) = stages.denoised
    assert (job.width, job.height, job.num_inference_steps) == (32, 32, 33)
    assert job.init is not None
    (image,) = entry["outputs"]["9"]["images"]
    graph["10"]["inputs"]["image"] = f"{image['filename']} [output]"
    assert history(http, sent(http, graph))["status"]["completed"]
    shown = http.get("/object_info/LoadImage").json()["LoadImage"]["input"]["required"]["image"]
    assert shown[0] == ["winter/house.png"]


@pytest.mark.parametrize("field", ["subfolder", "overwrite"])
def test_a_file_where_text_belongs_is_refused(http: httpx.Client, field: str):
    answer = http.post("/upload/image", files={"image": ("a.png", png()), field: ("b", b"true")})
    assert answer.status_code == 400
    assert answer.json()["error"]["extra_info"]["field"] == field


def test_uploads_of_one_name_do_not_take_each_others_place(http: httpx.Client):
    assert uploaded(http, "a.png", png())["name"] == "a.png"
    assert uploaded(http, "a.png", png())["name"] == "a.png"
    assert uploaded(http, "a.png", png(colour="blue"))["name"] == "a (1).png"
    assert uploaded(http, "a.png", png(colour="blue"), overwrite="true")["name"] == "a.png"
    view = http.get("/view", params={"filename": "a.png", "type": "input"})
    assert view.content == png(colour="blue")


@pytest.mark.parametrize(
    ("name", "data", "form", "status"),
    [
        ("../a.png", png(), {}, 400),
        ("a.png", png(), {"subfolder": "../.."}, 400),
        ("a.png", b"<html>", {}, 400),
        ("x" * 300, png(), {}, 400),
        ("😀" * 200, png(), {}, 400),  # with what stands before it, longer than a key may be
        ("a.png [output]", png(), {}, 400),  # a workflow that names it means another folder
    ],
    ids=["name leads out", "folder leads out", "no picture", "long", "long in bytes", "annotated"],
)
def test_what_is_no_picture_with_a_name_is_refused(
    http: httpx.Client, name: str, data: bytes, form: dict[str, str], status: int
):
    answer = http.post("/upload/image", files={"image": (name, data)}, data=form)
    assert answer.status_code == status
    assert answer.json()["error"]["extra_info"]["field"] in ("image", "init_image")
    assert http.post("/upload/image", data={"image": "x"}).status_code in (400, 415)
    odd = {"Content-Type": "multipart/form-data; boundary=x; charset=undefined"}
    form_data = b'--x\r\nContent-Disposition: form-data; name="type"\r\n\r\n\xff\r\n--x--\r\n'
    assert http.post("/upload/image", headers=odd, content=form_data).status_code == 415
    plain = {"Content-Type": "multipart/form-data; boundary=x"}
    assert http.post("/upload/image", headers=plain, content=form_data).status_code == 400
    missing = http.get("/view", params={"filename": "nobody.png", "type": "input"})
    assert missing.status_code == 404


def test_names_of_any_letters_are_kept_as_far_as_there_is_room(http: httpx.Client):
    names = ["😀" * 62 + ".png", "a" * 180, "a" * 181, "a" * 255]
    for name in names:
        assert uploaded(http, name, png())["name"] == name
    shown = http.get("/object_info/LoadImage").json()["LoadImage"]["input"]["required"]["image"]
    assert sorted(shown[0]) == sorted(names)
    for name in names:
        assert http.get("/view", params={"filename": name, "type": "input"}).content == png()


def test_previews_of_what_strangers_send_are_bounded(http: httpx.Client):
    long = io.BytesIO()
    Image.new("RGB", (20_000, 16)).save(long, "PNG")  # WebP has 16,383 pixels a side at most
    uploaded(http, "long.png", long.getvalue())
    uploaded(http, "torn.png", png(256, "blue")[:-40])
    for kind in ("webp", "jpeg"):
        asked = {"type": "input", "preview": f"{kind};50"}
        answer = http.get("/view", params={"filename": "long.png", **asked})
        with Image.open(io.BytesIO(answer.content)) as image:
            assert image.size[0] == 2048
        torn = http.get("/view", params={"filename": "torn.png", **asked})
        assert torn.status_code == 400
        assert torn.json()["error"]["extra_info"]["field"] == "init_image"


def test_a_workflow_of_too_many_start_images_is_refused_unseen(http: httpx.Client):
    graph = workflow("image_to_image")
    for number in range(100):
        graph[f"load {number}"] = {
            "class_type": "LoadImage",
            "inputs": {"image": f"{number}.png"},
        }
    refused = http.post("/prompt", json={"prompt": graph})
    assert refused.status_code == 400
    assert refused.json()["error"]["details"] == "at most 64"
