// The form and the request that it stands for, both ways.

import { byId, element, tell } from "./dom.js";
import { StartImage } from "./start.js";

const NUMBERS = ["width", "height", "num_inference_steps", "guidance_scale", "num_images"];
const CHOICES = ["model", "sampler", "scheduler"];
const TEXTS = ["prompt", "negative_prompt"];
const OWN = new Set([...NUMBERS, ...CHOICES, ...TEXTS, "seed", "loras", "init_image", "strength"]);
// About how a job is done or told, not about what the picture shows.
const NOT_CARRIED = new Set(["idempotency_key", "deadline_s", "priority", "preview_every", "tenant"]);
const CONTRACT_DEFAULTS = {
  negative_prompt_range: [0, 1],
  output_format: "png",
  quality: 90,
  embed_prompt: true,
};
const PREVIEWS = 16;

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

export class RequestForm {
  /** @param onSubmit called with the request */
  constructor(onSubmit) {
    this.form = byId("request");
    this.models = [];
    this.carried = {};
    this.start = new StartImage(
      (width, height) => this.shape(width / height),
      (error) => this.complain(error && { field: "init_image", words: error.words }),
    );
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      const problem = this.seedProblem() ?? this.startProblem();
      this.complain(problem);
      if (!problem) onSubmit(this.request());
    });
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    // What is being put right is not wrong any more, as far as one knows here.
    this.form.addEventListener("input", ({ target }) => clear(target.closest(".field")));
    byId("model").addEventListener("change", () => this.takeDefaults());
    byId("add-lora").addEventListener("click", () => this.addLora().focus());
    for (const button of this.form.querySelectorAll("[data-ratio]")) {
      button.addEventListener("click", () => this.shape(Number(button.dataset.ratio)));
    }
  }

  get model() {
    return this.models.find((each) => each.name === byId("model").value);
  }

  setModels(models) {
    const chosen = byId("model").value;
    this.models = models.filter((each) => each.defaults);
    const options = this.models.map((each) =>
      element("option", { value: each.name, disabled: each.state !== "loaded" },
        each.state === "loaded" ? each.name : `${each.name} (${each.state})`));
    byId("model").replaceChildren(...options);
    if (this.models.some((each) => each.name === chosen)) byId("model").value = chosen;
    else this.takeDefaults();
    this.offerLoras();
  }

  takeDefaults() {
    const model = this.model;
    if (!model) return;
    for (const name of ["width", "height"]) {
      const input = byId(name);
      input.step = model.size_multiple;
      input.min = model.smallest_side;
      input.max = name === "width" ? model.largest_width : model.largest_height;
    }
    for (const [name, value] of Object.entries(model.defaults)) {
      if (OWN.has(name)) byId(name).value = value;
    }
    byId("loras").replaceChildren();
    this.offerLoras();
  }

  offerLoras() {
    const has = Boolean(this.model?.loras?.length);
    byId("add-lora").disabled = !has;
    byId("add-lora").textContent = has ? "Add a LoRA" : "This model has no LoRAs";
  }

  /** Set width and height to a ratio, about as many pixels as by default, as the model allows. */
  shape(ratio) {
    const model = this.model;
    const { defaults, size_multiple: multiple, smallest_side: least } = model;
    const area = defaults.width * defaults.height;
    const to = (pixels, most) =>
      Math.min(most, Math.max(least, Math.round(pixels / multiple) * multiple));
    byId("width").value = to(Math.sqrt(area * ratio), model.largest_width);
    byId("height").value = to(Math.sqrt(area / ratio), model.largest_height);
  }

  addLora(name = null, weight = 1) {
    const known = this.model?.loras ?? [];
    const names = name === null || known.includes(name) ? known : [name, ...known];
    const select = element("select", { "aria-label": "LoRA" },
      ...names.map((each) => element("option", { value: each }, each)));
    if (name !== null) select.value = name;
    const input = element("input", {
      type: "number", step: "any", min: -10, max: 10, value: weight, "aria-label": "Weight",
    });
    const row = element("div", { class: "lora" }, select, input,
      element("button", {
        type: "button", class: "quiet", "aria-label": "Remove this LoRA",
        click: () => { row.remove(); byId("add-lora").focus(); },
      }, "×"));
    byId("loras").append(row);
    return select;
  }

  /** Return what is wrong with the seed, which is sent as digits and so must be some. */
  seedProblem() {
    if (/^\d{0,20}$/.test(byId("seed").value.trim())) return null;
    const words = "A seed is a whole number from 0 to 18446744073709551615; empty draws one.";
    return { field: "seed", words };
  }

  startProblem() {
    if (!this.start.isSending) return null;
    return { field: "init_image", words: "The start image is still being sent." };
  }

  request() {
    const request = { ...this.carried, ...this.start.fields() };
    for (const name of TEXTS) request[name] = byId(name).value;
    for (const name of CHOICES) if (byId(name).value) request[name] = byId(name).value;
    for (const name of NUMBERS) {
      // What is no number is sent as it is: the service says what is wrong with it.
      const { value, valueAsNumber, validity } = byId(name);
      if (validity.badInput) request[name] = "not a number";
      else if (value !== "") request[name] = valueAsNumber;
    }
    const seed = byId("seed").value.trim();
    if (seed) request.seed = seed;
    const loras = [...byId("loras").children].map((row) => ({
      name: row.querySelector("select").value,
      weight: row.querySelector("input").valueAsNumber,
    }));
    if (loras.length) request.loras = loras;
    const steps = Number(request.num_inference_steps) || 28;
    request.preview_every = Math.max(1, Math.round(steps / PREVIEWS));
    return request;
  }

  /** Take over every parameter of a request that made a picture. */
  use(request) {
    if (this.models.some((each) => each.name === request.model)) {
      byId("model").value = request.model;
      this.takeDefaults();
    }
    for (const name of [...TEXTS, ...NUMBERS, "sampler", "scheduler", "seed"]) {
      byId(name).value = request[name] ?? "";
    }
    byId("loras").replaceChildren();
    for (const { name, weight } of request.loras ?? []) this.addLora(name, weight);
    if (request.init_image) {
      this.start.take(request.init_image, "as that picture did", null, request.strength ?? null);
    } else this.start.clear();
    const usual = { ...CONTRACT_DEFAULTS, ...this.model?.defaults };
    this.carry(Object.fromEntries(Object.entries(request).filter(([name, value]) =>
      !OWN.has(name) && !NOT_CARRIED.has(name) && value !== null && !same(value, usual[name]))));
    this.complain(null);
  }

  /** Start from a picture of one's own, in its size; `source` is where the page finds it. */
  startFrom(image, source) {
    this.start.take(image.s3_uri, "the picture shown", source);
    byId("width").value = image.width;
    byId("height").value = image.height;
    byId("settings").open = true;
  }

  /** Keep parameters that have no field of their own, and say so. */
  carry(parameters) {
    this.carried = parameters;
    const names = Object.keys(parameters);
    const note = byId("carried");
    note.hidden = names.length === 0;
    note.replaceChildren(`Also taken over: ${names.join(", ")}. `,
      element("button", { type: "button", class: "quiet", click: () => this.carry({}) }, "Leave out"));
  }

  /** Show an error at the field that it names, else beneath the form; none clears them all. */
  complain(error) {
    clear(this.form);
    tell(byId("request-problem"), null);
    if (!error) return;
    const name = error.field?.split(".")[0] ?? "";
    const field = [...this.form.querySelectorAll("[data-field]")]
      .find((each) => each.dataset.field === name);
    const input = field?.querySelector("input, textarea, select");
    if (!input) {
      tell(byId("request-problem"), error.words ?? String(error));
      return;
    }
    byId("settings").open ||= byId("settings").contains(field);
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-describedby", `${name}-problem`);
    field.append(element("p", { class: "problem", id: `${name}-problem`, role: "alert" }, error.words));
    input.focus();
  }
}

/** Take away what is said to be wrong in a field, or in all of them. */
function clear(within) {
  for (const shown of within?.querySelectorAll(".field .problem") ?? []) shown.remove();
  for (const input of within?.querySelectorAll("[aria-invalid]") ?? []) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
}
