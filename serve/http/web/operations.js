// How the service stands: what waits, replicas and the autoscaler's reasons, and each card's heat.

import { call } from "./api.js";
import { byId, element, tell } from "./dom.js";
import { Line } from "./lines.js";

const PERIOD_MS = 1000;
const CARDS_SHOWN = 60;
const STAGES = { text: "Text encoding", denoise: "Denoising", decode: "Decoding" };

const sum = (values) => values.reduce((one, other) => one + other, 0);
const time = (seconds) => new Date(seconds * 1000).toLocaleTimeString();

export class Operations {
  constructor() {
    this.queues = new Map(); // stage -> Line
    this.cards = new Map(); // replica -> Card
    this.running = false;
  }

  start() {
    if (this.running) return;
    this.running = true;
    this.look();
  }

  stop() {
    this.running = false;
    clearTimeout(this.timer);
  }

  async look() {
    try {
      if (!document.hidden) this.show(await call("GET", "v1/status"));
      tell(byId("operations-problem"), null);
    } catch (error) {
      tell(byId("operations-problem"), error.words ?? String(error));
    }
    // One after the other: a service that is slow to answer is not asked more often for it.
    if (this.running) this.timer = setTimeout(() => this.look(), PERIOD_MS);
  }

  show(status) {
    const services = [
      { model: null, stages: status.stages, autoscaling: status.autoscaling },
      ...Object.entries(status.further_models ?? {})
        .filter(([, told]) => told.stages)
        .map(([model, told]) => ({ model, ...told })),
    ];
    const replicas = services.flatMap(({ stages }) => Object.values(stages).flat());
    this.showQueues(replicas);
    this.showPools(services, replicas);
    this.showCards(replicas);
    this.showChanges(services);
  }

  showQueues(replicas) {
    for (const [stage, label] of Object.entries(STAGES)) {
      const own = replicas.filter((each) => each.stage === stage);
      const line = this.queues.get(stage) ?? new Line(`${label}: waits`, { unit: "s", digits: 1 });
      if (!this.queues.has(stage)) {
        this.queues.set(stage, line);
        byId("queues").append(element("div", { class: "panel" }, line.element));
      }
      // Shared by the replicas of the stage; their seconds are those of cool cards.
      line.push(own.length ? sum(own.map(({ load }) => load.waiting_s ?? 0)) / own.length : null);
    }
  }

  showPools(services, replicas) {
    const rows = services.flatMap(({ model, autoscaling }) =>
      Object.entries(autoscaling?.pools ?? {}).map(([pool, told]) => {
        const running = replicas.filter((each) => each.pool === pool).length;
        const target = told.target ?? running;
        return element("tr", {},
          element("th", { scope: "row" }, model ? `${pool} (${model})` : pool),
          element("td", { class: "number" }, target === running ? `${running}` : `${running} → ${target}`),
          element("td", {}, told.reason ?? ""));
      }));
    const warnings = services.flatMap(({ autoscaling }) => autoscaling?.warnings ?? []);
    byId("pools").replaceChildren(...rows, ...warnings.map((warning) =>
      element("tr", {}, element("td", { colspan: 3, class: "warning" }, warning))));
  }

  showCards(replicas) {
    // The hottest first, where there are too many to look at.
    const hottest = [...replicas].sort((one, other) =>
      (one.heat?.margin_c ?? Infinity) - (other.heat?.margin_c ?? Infinity));
    const chosen = new Set(hottest.slice(0, CARDS_SHOWN).map(({ replica }) => replica));
    tell(byId("cards-note"), replicas.length > CARDS_SHOWN &&
      `The ${CARDS_SHOWN} hottest of ${replicas.length} replicas.`);
    for (const [replica, card] of this.cards) {
      if (!chosen.has(replica)) {
        card.element.remove();
        this.cards.delete(replica);
      }
    }
    const shown = replicas.filter(({ replica }) => chosen.has(replica));
    // Those whose heat is known stand first.
    shown.sort((one, other) => (other.heat ? 1 : 0) - (one.heat ? 1 : 0));
    for (const each of shown) {
      if (!this.cards.has(each.replica)) {
        const card = new Card(each);
        this.cards.set(each.replica, card);
        byId("cards").append(card.element);
      }
      this.cards.get(each.replica).show(each);
    }
  }

  showChanges(services) {
    const changes = services.flatMap(({ autoscaling }) => autoscaling?.changes ?? []);
    byId("changes-section").hidden = changes.length === 0;
    changes.sort((one, other) => other.at - one.at);
    byId("changes").replaceChildren(...changes.slice(0, 30).map(({ at, reason }) =>
      element("li", {}, element("time", {}, time(at)), ` ${reason}`)));
  }
}

class Card {
  constructor({ pool, replica, stage, heat }) {
    this.badge = element("span", { class: "badge", hidden: true });
    this.note = element("p", { class: "hint" });
    this.lines = { rows: new Line("Rows", { least: 4 }), waits: new Line("Waits", { unit: "s", digits: 1 }) };
    if (heat) {
      this.lines = {
        temperature: new Line("Temperature", { unit: "°C", least: 20 }),
        margin: new Line("Margin", { unit: "°C", least: 20 }),
        power: new Line("Power", { unit: "W", least: 50 }),
        rows: this.lines.rows,
      };
    } else if (stage !== "denoise") {
      delete this.lines.rows;
    }
    this.element = element("article", { class: "panel card" },
      element("h3", {}, pool, element("small", {}, replica === pool ? "" : replica.slice(-8)), this.badge),
      element("div", { class: "lines" }, ...Object.values(this.lines).map((line) => line.element)),
      this.note);
  }

  show({ device, precision, heat, load, loras }) {
    this.lines.rows?.push(load.rows ?? null);
    this.lines.waits?.push(load.waiting_s ?? null);
    this.lines.temperature?.push(heat?.temperature_c, heat?.limit_c ?? null);
    this.lines.margin?.push(heat?.margin_c);
    this.lines.power?.push(heat?.power_w, heat?.power_cap_w ?? null);
    const told = [heat?.throttled && "throttled", heat?.scripted && "rehearsal"].filter(Boolean);
    tell(this.badge, told.join(", "));
    this.element.classList.toggle("hot", Boolean(heat?.throttled) || (heat?.margin_c ?? 99) < 5);
    const governor = heat?.governor;
    this.note.textContent = [
      `${device}, ${precision}`,
      load.duty < 1 && `may compute ${Math.round(load.duty * 100)} % of the time`,
      load.slowdown > 1.05 && `${load.slowdown.toFixed(1)} times as slow as cool`,
      governor?.reason,
      !heat && "no readings of a card here",
      ...(heat?.problems ?? []),
      loras?.held?.length && `holds ${loras.held.join(", ")}`,
    ].filter(Boolean).join(" · ");
  }
}
