// The picture that is looked at: forming while its job runs, then as it was stored.

import { ApiError, call, follow, imagePath } from "./api.js";
import { byId, element, tell } from "./dom.js";

const LOST_MS = 2000;
const WORDS = {
  queued: "Waiting for its turn",
  text: "Reading the prompt",
  decode: "Decoding",
  stored: "Done",
  failed: "Failed",
  cancelled: "Cancelled",
};

export class Stage {
  /**
   * @param onEnd called with the record of a job that has ended
   * @param onReuse called with the request to take over
   * @param onStartFrom called with the first picture, and where the page finds it
   * @param onDeleted called with the id of a job that is gone
   */
  constructor({ onEnd, onReuse, onStartFrom, onDeleted }) {
    this.onEnd = onEnd;
    this.onDeleted = onDeleted;
    this.unfollow = () => {};
    this.record = null;
    byId("cancel").addEventListener("click", () => this.cancel());
    byId("reuse").addEventListener("click", () => onReuse(this.record.request));
    byId("start-from").addEventListener("click", () => {
      const [image] = this.record.result.images;
      onStartFrom(image, imagePath(this.record.id, image.index));
    });
    byId("delete").addEventListener("click", () => this.delete());
  }

  /** Show a job, and follow it where it has not ended. */
  show(record) {
    this.unfollow();
    this.record = record;
    this.done = new Map(); // picture -> steps finished
    const { request } = record;
    const pictures = request?.num_images ?? 1;
    this.frames = Array.from({ length: pictures }, (_, index) => frame(request, index, pictures));
    byId("frames").replaceChildren(...this.frames.map(({ figure }) => figure));
    byId("frames").classList.toggle("several", pictures > 1);
    byId("caption").textContent = request?.prompt ?? "";
    byId("facts").textContent = facts(record);
    tell(byId("stage-problem"), null);
    byId("download").hidden = byId("start-from").hidden = true;
    byId("reuse").hidden = byId("delete").hidden = !request;
    if (record.status === "pending" || record.status === "running") {
      this.say(WORDS.queued);
      this.bar(0, null);
      byId("cancel").hidden = false;
      byId("cancel").disabled = false;
      this.unfollow = follow(record.id, (event) => this.on(event));
    } else {
      this.end(record);
    }
  }

  on(event) {
    if (event.id !== this.record?.id) return;
    if (event.event === "step") this.step(event);
    else if (event.event === "stored") this.end({ ...this.record, status: "succeeded", result: event.result });
    else if (event.event === "failed") this.end({ ...this.record, status: "failed", error: event.error });
    else if (event.event === "cancelled") this.end({ ...this.record, status: "cancelled" });
    else if (event.event === "lost") setTimeout(() => this.lookAgain(event.id), LOST_MS);
    else this.say(WORDS[event.event]);
  }

  step({ image, step, steps, preview }) {
    this.done.set(image, step);
    const sum = [...this.done.values()].reduce((one, other) => one + other, 0);
    const all = steps * this.frames.length;
    this.bar(sum, all);
    byId("steps").textContent = `${sum} of ${all} steps`;
    const shown = this.frames[image];
    if (preview) shown.show(`data:image/jpeg;base64,${preview}`, "forming");
    // Said once, not at every step: a screen reader would talk without end.
    this.say("Drawing");
  }

  end(record) {
    this.unfollow();
    this.unfollow = () => {};
    this.record = record;
    this.bar(null, null);
    byId("cancel").hidden = true;
    byId("facts").textContent = facts(record);
    const ended = { succeeded: "stored", failed: "failed", cancelled: "cancelled" }[record.status];
    this.say(WORDS[ended]);
    this.onEnd(record);
    if (record.error?.error) tell(byId("stage-problem"), new ApiError(0, record.error.error).words);
    const images = record.result?.images ?? [];
    for (const image of images) this.frames[image.index]?.show(imagePath(record.id, image.index), "made");
    for (const one of this.frames) one.figure.classList.toggle("nothing", images.length === 0);
    const [first] = images;
    if (!first) return;
    byId("download").hidden = byId("start-from").hidden = false;
    byId("download").href = imagePath(record.id, first.index);
    byId("download").download = `kelvin-${record.id}.${first.output_format}`;
    tell(byId("stage-problem"), (record.result.warnings ?? []).join("\n"));
  }

  /** Learn how the job stands that is looked at, if it still is. */
  async lookAgain(id) {
    let record;
    try {
      record = await call("GET", `v1/jobs/${id}`);
    } catch (error) {
      if (this.record?.id === id) tell(byId("stage-problem"), error.words);
      return;
    }
    if (this.record?.id === id) this.show(record);
  }

  async cancel() {
    byId("cancel").disabled = true;
    const { id } = this.record;
    try {
      const record = await call("DELETE", `v1/jobs/${id}`);
      if (this.record?.id === id) this.end(record);
    } catch (error) {
      // It may have ended a moment before.
      await this.lookAgain(id);
      if (error.status !== 409) tell(byId("stage-problem"), error.words);
    }
  }

  async delete() {
    const { id } = this.record;
    if (!window.confirm("Delete this job and its pictures from the store?")) return;
    try {
      await call("DELETE", `v1/jobs/${id}?purge=true`);
    } catch (error) {
      tell(byId("stage-problem"), error.words);
      return;
    }
    this.clear();
    this.say("Deleted");
    this.onDeleted(id);
  }

  clear() {
    this.unfollow();
    this.record = null;
    byId("frames").replaceChildren();
    for (const id of ["caption", "facts"]) byId(id).textContent = "";
    for (const id of ["cancel", "download", "reuse", "start-from", "delete", "progress"]) {
      byId(id).hidden = true;
    }
    tell(byId("stage-problem"), null);
  }

  say(words) {
    if (byId("status").textContent !== words) byId("status").textContent = words;
  }

  bar(value, most) {
    const progress = byId("progress");
    progress.hidden = value === null;
    byId("steps").textContent = "";
    if (most === null) progress.removeAttribute("value");
    else [progress.max, progress.value] = [most, value];
  }
}

function frame(request, index, pictures) {
  const image = element("img", { alt: "", hidden: true });
  const link = element("a", { target: "_blank", rel: "noopener" }, image);
  const figure = element("figure", { class: "frame" }, link);
  const { width = 1, height = 1, prompt = "" } = request ?? {};
  image.width = width;
  image.height = height;
  figure.style.aspectRatio = `${width} / ${height}`;
  const which = pictures > 1 ? ` (${index + 1} of ${pictures})` : "";
  return {
    figure,
    show(source, state) {
      image.src = source;
      image.hidden = false;
      image.alt = state === "made" ? `${prompt}${which}` : `Preview${which}`;
      figure.classList.toggle("forming", state === "forming");
      if (state === "made") link.href = source;
    },
  };
}

function facts({ request, result }) {
  if (!request) return "";
  const told = [
    request.width && `${request.width} × ${request.height}`,
    request.num_inference_steps && `${request.num_inference_steps} steps`,
    request.guidance_scale != null && `guidance ${request.guidance_scale}`,
    request.sampler && `${request.sampler}, ${request.scheduler}`,
    request.seed != null && `seed ${request.seed}`,
    ...(request.loras ?? []).map(({ name, weight }) => `${name}:${weight}`),
    request.model,
    result && `${result.seconds.toFixed(1)} s`,
    result?.joules != null && `${result.joules.toFixed(0)} J`,
  ];
  return told.filter(Boolean).join(" · ");
}
