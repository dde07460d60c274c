// Everything the store keeps of one's own, newest first: more is fetched as one comes to the end.

import { call, imagePath } from "./api.js";
import { byId, element } from "./dom.js";

const PAGE = 24;
const NEWEST = 12;
const BUSY_MS = 2000;
const IDLE_MS = 10000;

const isOver = ({ status }) => !["pending", "running"].includes(status);

export class Gallery {
  /** @param onChoose called with the record of the job that was clicked on */
  constructor(onChoose) {
    this.onChoose = onChoose;
    this.tiles = new Map(); // job id -> { item, record }
    this.removed = new Set(); // an answer that was under way may still tell of them
    this.after = null;
    this.loading = false;
    byId("more").addEventListener("click", () => this.older());
    // Scrolling loads as well; the button is for keyboards, and for those who scroll too fast.
    new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) this.older();
    }, { rootMargin: "400px" }).observe(byId("more"));
    document.addEventListener("visibilitychange", () => this.refreshLater(0));
  }

  async start() {
    await this.older();
    this.refreshLater(IDLE_MS);
  }

  async older() {
    if (this.loading) return;
    this.loading = true;
    try {
      const page = await call("GET", `v1/jobs?limit=${PAGE}${this.after ? `&after=${this.after}` : ""}`);
      page.jobs.forEach((record) => this.put(record));
      this.after = page.next;
      byId("more").hidden = page.next === null;
    } catch {
      byId("more").hidden = false;
    } finally {
      this.loading = false;
    }
    byId("gallery-empty").hidden = this.tiles.size > 0;
  }

  refreshLater(after) {
    clearTimeout(this.timer);
    if (document.hidden) return;
    this.timer = setTimeout(() => this.refresh(), after);
  }

  /** Learn of jobs that are new, made here or elsewhere, and of how those under way stand. */
  async refresh() {
    try {
      const { jobs } = await call("GET", `v1/jobs?limit=${NEWEST}`);
      jobs.forEach((record) => this.put(record));
      const told = new Set(jobs.map(({ id }) => id));
      const others = [...this.tiles.values()]
        .filter(({ record }) => !isOver(record) && !told.has(record.id))
        .map(({ record }) => this.ask(record.id));
      await Promise.all(others);
    } catch {
      // The next one may be answered; what is shown stays as it was.
    }
    const busy = [...this.tiles.values()].some(({ record }) => !isOver(record));
    this.refreshLater(busy ? BUSY_MS : IDLE_MS);
  }

  async ask(id) {
    try {
      this.put(await call("GET", `v1/jobs/${id}`));
    } catch (error) {
      if (error.status === 404) this.remove(id);
    }
  }

  /** Show a job where it belongs: ids begin with the time. */
  put(record) {
    const known = this.tiles.get(record.id);
    if (this.removed.has(record.id) || (known && isOver(known.record))) return;
    const item = this.tile(record);
    if (known) {
      const hadFocus = known.item.contains(document.activeElement);
      known.item.replaceWith(item);
      if (hadFocus) item.querySelector("button").focus();
    } else {
      const older = [...byId("tiles").children].find((each) => each.dataset.id < record.id);
      byId("tiles").insertBefore(item, older ?? null);
    }
    this.tiles.set(record.id, { item, record });
    byId("gallery-empty").hidden = true;
  }

  remove(id) {
    this.removed.add(id);
    this.tiles.get(id)?.item.remove();
    this.tiles.delete(id);
    byId("gallery-empty").hidden = this.tiles.size > 0;
  }

  tile(record) {
    const prompt = record.request?.prompt ?? "a job that cannot be read";
    const images = record.result?.images ?? [];
    const preview = record.progress?.preview;
    const source = images.length ? `${imagePath(record.id, images[0].index)}/thumbnail`
      : preview && `data:image/jpeg;base64,${preview}`;
    const picture = source
      ? element("img", { src: source, alt: "", loading: "lazy", decoding: "async" })
      : element("span", { class: "word" }, isOver(record) ? record.status : "waiting");
    const { step, steps } = record.progress ?? {};
    const button = element("button", {
      type: "button",
      class: `tile ${record.status}`,
      title: prompt,
      "aria-label": `${record.status === "succeeded" ? "" : `${record.status}: `}${prompt}`,
      click: () => this.onChoose(this.tiles.get(record.id).record),
    }, picture,
    images.length > 1 && element("span", { class: "count" }, `${images.length}`),
    !isOver(record) && step && element("progress", { value: step, max: steps, "aria-hidden": "true" }));
    const item = element("li", {}, button);
    item.dataset.id = record.id;
    return item;
  }
}
