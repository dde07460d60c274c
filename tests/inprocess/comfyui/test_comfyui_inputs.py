"""Pictures that are uploaded by name, to start from."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from comfy_api_simplified import ComfyApiWrapper

from tests.inprocess.comfyui.caller import history, png, sent, uploaded, workflow
from tests.inprocess.served import Served
from tests.inprocess.stand_in_stages import StandIn


def test_a_start_image_is_uploaded_by_name(
    server: Served, http: httpx.Client, stages: StandIn, tmp_path: Path
):
    (tmp_path / "house.png").write_bytes(png())
    kept = ComfyApiWrapper(server.url).upload_image(tmp_path / "house.png", "winter")
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
    ],
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
    assert http.post("/upload/image", headers=odd, content=form_data).status_code == 400
    missing = http.get("/view", params={"filename": "nobody.png", "type": "input"})
    assert missing.status_code == 404
