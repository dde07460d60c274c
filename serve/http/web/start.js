// The picture that drawing starts from: sent when it is chosen, or one of one's own that is shown.

import { upload } from "./api.js";
import { byId } from "./dom.js";

const USUAL_STRENGTH = 0.6; // the service's own, shown so that one sees what can be changed

export class StartImage {
  /**
   * @param onSize called with width and height of a picture that was chosen
   * @param onProblem called with an error, or with null where there is none any more
   */
  constructor(onSize, onProblem) {
    this.onSize = onSize;
    this.onProblem = onProblem;
    this.uri = null;
    this.latest = 0;
    byId("start-file").addEventListener("change", () => this.send(byId("start-file").files[0]));
    byId("start-remove").addEventListener("click", () => {
      this.clear();
      byId("start-file").focus();
    });
  }

  /** Return the fields of a request. */
  fields() {
    if (this.uri === null) return {};
    const { value, valueAsNumber, validity } = byId("strength");
    if (validity.badInput) return { init_image: this.uri, strength: "not a number" };
    return { init_image: this.uri, ...(value === "" ? {} : { strength: valueAsNumber }) };
  }

  /** Whether a file is on its way: what is sent now would be without it. */
  get isSending() {
    return byId("start").getAttribute("aria-busy") === "true";
  }

  async send(file) {
    if (!file) return;
    this.clear();
    const number = (this.latest += 1);
    this.show(`Sending ${file.name} …`, null);
    byId("start").setAttribute("aria-busy", "true");
    try {
      const kept = await upload(file);
      if (number !== this.latest) return;
      this.take(kept.init_image, file.name, await dataUri(file));
      this.onSize(kept.width, kept.height);
      this.onProblem(null);
    } catch (error) {
      if (number !== this.latest) return;
      this.clear();
      this.onProblem(error);
    }
  }

  /**
   * Start from a picture that the service has.
   * @param uri as a request's init_image says it
   * @param name to be shown
   * @param source of it for the page; null: it is not shown
   */
  take(uri, name, source, strength = null) {
    this.latest += 1;
    this.uri = uri;
    this.show(name, source);
    byId("start").removeAttribute("aria-busy");
    byId("strength-field").hidden = false;
    if (strength !== null) byId("strength").value = strength;
    else if (byId("strength").value === "") byId("strength").value = USUAL_STRENGTH;
  }

  clear() {
    this.latest += 1;
    this.uri = null;
    byId("start-file").value = "";
    byId("start-file").hidden = false;
    byId("start").hidden = true;
    byId("start").removeAttribute("aria-busy");
    byId("strength-field").hidden = true;
    byId("strength").value = "";
  }

  show(name, source) {
    byId("start-name").textContent = name;
    byId("start-file").hidden = true;
    byId("start").hidden = false;
    byId("start-picture").hidden = source === null;
    if (source === null) byId("start-picture").removeAttribute("src");
    else byId("start-picture").src = source;
  }
}

/** The page's policy lets pictures come from Kelvin or as data, and from nowhere else. */
function dataUri(file) {
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => resolve(null));
    reader.readAsDataURL(file);
  });
}
