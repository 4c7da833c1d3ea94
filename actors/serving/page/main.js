// The page: asks what is served, wires the controls, and hands every change of the race to the views.

import { apiKey, getInfo, isAbort, setPlanners } from "./api.js";
import { createControls } from "./controls.js";
import { byId } from "./dom.js";
import { chromeTrace, download, eventLog, fileName } from "./export.js";
import { createProblemBox } from "./problem.js";
import { SYSTEMS, newRace, raceIsOver, reduce, summary } from "./race.js";
import { runRace } from "./runner.js";
import { drawScore, emptyScore, runScore } from "./score.js";
import { createViews } from "./views.js";

const views = createViews();
let info = null;
let controls = null;
let box = null;
let prepared = false; // the first problem is there, or cannot be had
let race = null;
let racing = null; // AbortController of the running race
let scoring = null; // and of the running score

// -------------------------------------------------------------------------------------------------------- messages

function showError(error) {
  if (isAbort(error)) return;
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  byId("error-text").textContent = `${error.message}${wait}`;
  byId("errors").hidden = false;
  if (error.status === 401) askForKey();
}

const clearError = () => (byId("errors").hidden = true);

const announce = (text) => (byId("announcer").textContent = text);

function askForKey() {
  byId("key-toggle").hidden = false;
  openKeyForm(true);
}

function openKeyForm(open) {
  byId("key-form").hidden = !open;
  byId("key-toggle").setAttribute("aria-expanded", String(open));
  if (open) byId("key").focus();
}

function setServer(text, kind) {
  byId("server").textContent = text;
  byId("server-mark").className = `lamp ${kind}`;
}

// ------------------------------------------------------------------------------------------------------------ race

async function startRace() {
  if (!prepared) return;
  stopRace();
  clearError();
  const own = (racing = new AbortController());
  let mine = (race = newRace(box.prompt(), box.problem(), controls.values(), info.model));
  views.startRace(race);
  setRunning();
  announce("The race has begun.");
  const dispatch = (name, action) => {
    mine = reduce(mine, name, action);
    // A race that was stopped for another problem shows nothing any more.
    if (racing === own) views.update((race = mine));
    return mine;
  };
  await runRace(mine, dispatch, showError, own.signal);
  if (racing !== own) return;
  racing = null;
  setRunning();
  if (raceIsOver(race)) announce(SYSTEMS.map((name) => summary(race, name)).join(" "));
}

function stopRace() {
  racing?.abort();
}

function setRunning() {
  byId("start").disabled = !prepared || racing !== null;
  byId("stop").disabled = racing === null;
  document.body.classList.toggle("racing", racing !== null);
  const logged = race !== null && SYSTEMS.some((name) => race.systems[name].log.length || race.systems[name].tokens.length);
  for (const id of ["export-log", "export-trace"]) byId(id).disabled = racing !== null || !logged;
}

function showProblem(problem) {
  const stopped = racing;
  racing = null; // what the old race still says is not of this problem
  stopped?.abort();
  race = null;
  views.showProblem(problem);
  byId("score-start").disabled = scoring !== null || !info.tasks.length;
  setRunning();
}

// ----------------------------------------------------------------------------------------------------------- score

async function startScore() {
  if (scoring || !controls) return;
  clearError();
  const count = Math.min(1000, Math.max(1, Math.round(byId("score-count").valueAsNumber) || 1));
  byId("score-count").value = count;
  const settings = controls.values();
  const pace = byId("score-pace").value;
  if (pace !== "as set") settings.pace = pace === "none" ? 0 : Number(pace);
  const asked = { model: info.model, task: byId("task").value, start: 0, count, settings };
  scoring = new AbortController();
  setScoring(0, count);
  let score = emptyScore();
  try {
    await runScore(asked, (next) => {
      score = next;
      setScoring(score.answered, count);
      drawScore(byId("score-result"), score);
    }, scoring.signal);
    announce(`${count} problems answered. ${byId("score-result").querySelector(".test").textContent}`);
  } catch (error) {
    showError(error);
  }
  scoring = null;
  setScoring(score.answered, count);
  byId("score-state").textContent = score.answered < count ? `stopped after ${score.answered} of ${count}` : `${asked.task}, problems 0 to ${count - 1}`;
}

function setScoring(answered, count) {
  byId("score-start").disabled = scoring !== null;
  byId("score-stop").disabled = scoring === null;
  Object.assign(byId("score-progress"), { value: answered, max: count, hidden: scoring === null });
  byId("score-state").textContent = `${answered} of ${count}`;
}

// ------------------------------------------------------------------------------------------------------------ setup

// A server that starts, restarts or is away is asked again, ever more rarely.
async function connect(tries = 0) {
  setServer("connecting", "");
  try {
    info = await getInfo();
  } catch (error) {
    setServer("not connected", "bad");
    showError(error);
    if (error.status === 0 || error.status === 503) setTimeout(() => connect(tries + 1), Math.min(10_000, 500 * 2 ** tries));
    return;
  }
  clearError();
  setServer(info.model, "good");
  if (info.auth) {
    byId("key-toggle").hidden = false;
    if (!apiKey.get()) askForKey();
  }
  if (!controls) {
    controls = createControls(info, changePlanners);
    box = createProblemBox(info, showProblem, showError);
    if (info.clock === "virtual") Object.assign(byId("score-pace"), { value: "none", disabled: true });
  }
  await box.load();
  prepared = true;
  setRunning();
}

async function changePlanners(count) {
  try {
    info.planners = await setPlanners(count);
  } catch (error) {
    showError(error);
  }
  controls.setPlanners(info.planners);
}

function wire() {
  byId("problem-form").addEventListener("submit", (event) => {
    event.preventDefault();
    startRace();
  });
  byId("stop").addEventListener("click", stopRace);
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) startRace();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    views.tooltip.hide();
    stopRace();
    scoring?.abort();
  });
  byId("reset").addEventListener("click", () => controls?.reset());
  byId("score-form").addEventListener("submit", (event) => {
    event.preventDefault();
    startScore();
  });
  byId("score-stop").addEventListener("click", () => scoring?.abort());
  byId("export-log").addEventListener("click", () => download(fileName(race, "jsonl"), eventLog(race), "application/x-ndjson"));
  byId("export-trace").addEventListener("click", () => download(fileName(race, "trace.json"), JSON.stringify(chromeTrace(race)), "application/json"));
  byId("error-close").addEventListener("click", clearError);
  byId("key-toggle").addEventListener("click", () => openKeyForm(byId("key-form").hidden));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    apiKey.set(byId("key").value.trim());
    byId("key").value = "";
    openKeyForm(false);
    connect();
  });
  byId("theme").value = document.documentElement.dataset.theme ?? "auto";
  byId("theme").addEventListener("change", ({ target }) => {
    if (target.value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = target.value;
    try {
      localStorage.setItem("crsm.theme", target.value);
    } catch {
      // No storage: it lasts as long as the page.
    }
  });
  if (matchMedia("(max-width: 860px)").matches) byId("settings").open = false;
  addEventListener("pagehide", () => {
    stopRace();
    scoring?.abort();
  });
}

wire();
connect();
