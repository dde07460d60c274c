// The page: who is here, which view is shown, and how its parts hang together.

import { ApiError, call } from "./api.js";
import { byId, tell } from "./dom.js";
import { RequestForm } from "./form.js";
import { Gallery } from "./gallery.js";
import { Operations } from "./operations.js";
import { Stage } from "./stage.js";

const MODELS_MS = 30000;

function showLogin() {
  byId("login").hidden = false;
  byId("key").focus();
  byId("login-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const key = byId("key").value.trim();
    try {
      if (!/^[\w-]+$/.test(key)) throw new ApiError(0, { message: "This is no API key." });
      await call("POST", "v1/session", undefined, { authorization: `Bearer ${key}` });
      byId("key").value = "";
      window.location.reload();
    } catch (error) {
      tell(byId("login-problem"), error.words);
      byId("key").select();
    }
  });
}

function showViews(session) {
  const operations = new Operations();
  const form = new RequestForm(submit);
  const gallery = new Gallery((record) => {
    stage.show(record);
    if (record.request) form.use(record.request);
    byId("stage").scrollIntoView({ block: "nearest" });
  });
  const stage = new Stage({
    onEnd: (record) => gallery.put(record),
    onReuse: (request) => {
      form.use(request);
      byId("prompt").focus();
    },
    onStartFrom: (image, source) => {
      form.startFrom(image, source);
      byId("prompt").focus();
    },
    onDeleted: (id) => {
      gallery.remove(id);
      byId("prompt").focus();
    },
  });

  async function submit(request) {
    const button = byId("generate");
    button.disabled = true;
    try {
      const record = await call("POST", "v1/jobs", request);
      gallery.put(record);
      gallery.refreshLater(1000);
      stage.show(record);
      byId("stage").scrollIntoView({ block: "nearest" });
    } catch (error) {
      form.complain(error);
    } finally {
      button.disabled = false;
    }
  }

  async function askForModels() {
    try {
      form.setModels((await call("GET", "v1/models")).models);
    } catch (error) {
      form.complain(error);
    }
    setTimeout(askForModels, MODELS_MS);
  }

  function showView() {
    const wanted = window.location.hash === "#operations" && session.roles.includes("admin")
      ? "operations" : "pictures";
    for (const name of ["pictures", "operations"]) byId(name).hidden = name !== wanted;
    for (const link of byId("views").querySelectorAll("a")) {
      if (link.hash === `#${wanted}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    if (wanted === "operations") operations.start();
    else operations.stop();
  }

  byId("views").hidden = false;
  byId("operations-link").hidden = !session.roles.includes("admin");
  // On a small screen the picture matters more than its settings.
  byId("settings").open = !window.matchMedia("(max-width: 760px)").matches;
  window.addEventListener("hashchange", showView);
  showView();
  askForModels();
  gallery.start();
}

byId("log-out").addEventListener("click", async () => {
  await call("DELETE", "v1/session");
  window.location.reload();
});

const session = await call("GET", "v1/session");
byId("log-out").hidden = !session.logged_in;
if (session.tenant === null) showLogin();
else showViews(session);
