// The stage of the Watch page. It asks for the next state when the last one is drawn, as often as the speed wants one and the screen can
// show one: whatever is slow makes fewer pictures, and no picture is ever old.
const watching = (() => {
  const SPEEDS = [0.25, 0.5, 1, 2, 4, 8], REMEMBERED = 400;
  const REST = 1000, ALIVE = 20000, SLOW = 12; // milliseconds
  const KEYS = {
    ArrowUp: "UP", KeyW: "UP", ArrowDown: "DOWN", KeyS: "DOWN", ArrowLeft: "LEFT", KeyA: "LEFT", ArrowRight: "RIGHT", KeyD: "RIGHT", Space: "FIRE",
  };
  const find = (name) => document.querySelector(`.watch-${name}`);
  const held = new Set(), tapped = new Set(); // keys that are down, and those that were since the last action
  let setup, moment, playing = true, byHand = false, speed = 2, due = 0, last = 0, rest = 0, asking = false, closed = false;
  let salient = false, rows = [], frames = [], told = {}, past = [];

  // Time

  function begin(given) {
    setup = given;
    setUp();
    document.addEventListener("keydown", onKey);
    document.addEventListener("keyup", (event) => held.delete(KEYS[event.code]));
    window.addEventListener("blur", () => held.clear());
    window.addEventListener("pagehide", (event) => event.persisted || navigator.sendBeacon(`${setup.address}/leave`));
    setInterval(() => document.hidden || playing || look(), ALIVE); // so that a paused game is not taken for a forgotten one
    last = performance.now();
    look();
    requestAnimationFrame(tick);
  }

  function tick(now) {
    if (closed) return;
    requestAnimationFrame(tick);
    goOn(now);
  }

  function goOn(now) {
    const rate = SPEEDS[speed] * setup.pace, passed = Math.max(0, now - last) / 1000;
    last = Math.max(last, now);
    if (!playing || closed || now < rest) return;
    due = Math.min(due + rate * passed, 2 + rate / 2); // what is later than that is dropped
    if (due < 1 || asking) return;
    const actions = Math.min(setup.leap, Math.max(1, Math.floor(due - rate / 5))); // a little late is made good one by one
    due -= actions;
    ask(actions);
  }

  async function ask(actions) {
    const hand = byHand && actions ? `&hand=${action()}` : "", asked = performance.now();
    asking = true;
    try {
      const reply = await fetch(`${setup.address}/next?actions=${actions}${hand}`, { method: "POST" });
      if (reply.ok) draw(await reply.arrayBuffer());
      else stop((await reply.json()).detail);
    } catch {
      rest = performance.now() + REST; // the studio does not answer; perhaps it will
    }
    asking = false;
    if (performance.now() - asked > SLOW) goOn(performance.now()); // rather than wait for the screen once more
  }

  async function look() {
    while (asking && !closed) await new Promise(requestAnimationFrame);
    if (!closed) await ask(0);
  }

  function stop(why) {
    closed = true;
    find("over").textContent = why;
  }

  // Hands

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = event.target;
    if (at.closest("input, textarea, select, [contenteditable=true], [role=slider], [role=combobox], [role=listbox], .q-menu")) return;
    if (event.code === "Space" && at.closest("button, a, [role=switch], [role=checkbox]")) return; // which it presses
    const part = KEYS[event.code];
    const act = { " ": pause, p: pause, n: step, "+": faster, "=": faster, "-": slower, t: turns }[event.key.toLowerCase()];
    if (byHand && part) {
      held.add(part);
      tapped.add(part);
    } else if (act) {
      if (event.repeat && act !== step) return;
      act();
    } else return;
    event.preventDefault();
    if (moment) showValues();
  }

  function action() {
    const down = new Set([...held, ...tapped]);
    tapped.clear();
    return named(down);
  }

  function named(down) {
    const one = (...names) => names.find((name) => down.has(name)) || "";
    const vertical = one("UP", "DOWN"), across = one("LEFT", "RIGHT"), fire = one("FIRE");
    // What the game has no action for loses a part: in Pong up is right, and right is what there is.
    const wanted = [vertical + across + fire, across + fire, vertical + fire, vertical + across, fire, across, vertical];
    const swapped = { UP: "RIGHT", DOWN: "LEFT" }[vertical];
    const found = [...wanted, ...(swapped ? [swapped + fire, swapped] : [])].find((name) => name && setup.names.includes(name));
    return Math.max(0, setup.names.indexOf(found || "NOOP"));
  }

  function turns() {
    byHand = !byHand;
    held.clear();
    tapped.clear();
    if (byHand) find("game").focus({ preventScroll: true });
    showState();
    if (moment) showValues();
  }

  // Buttons

  function pause() {
    playing = !playing;
    due = 0;
    showState();
  }

  async function step() {
    if (playing) pause();
    if (!asking) await ask(1);
  }

  function faster() {
    speed = Math.min(speed + 1, SPEEDS.length - 1);
    showState();
  }

  function slower() {
    speed = Math.max(speed - 1, 0);
    showState();
  }

  async function saliency(on) {
    if (salient === on) return;
    salient = on;
    let seen = null;
    while (salient && !closed) {
      await new Promise(requestAnimationFrame);
      if (moment === seen || !moment) continue;
      seen = moment;
      const reply = await fetch(`${setup.address}/saliency`);
      if (!reply.ok) break;
      const colours = new Uint8ClampedArray(await reply.arrayBuffer());
      if (salient) heat(colours, seen);
    }
    find("heat").getContext("2d").clearRect(0, 0, 9999, 9999);
    find("salient").textContent = "";
  }

  // Drawing

  function element(kind, parent, name = "", text = "") {
    const made = document.createElement(kind);
    made.className = name;
    made.textContent = text;
    parent.append(made);
    return made;
  }

  function setUp() {
    for (const name of ["score", "game", "lives", "step"]) {
      const pair = element("div", find("numbers"));
      element("dt", pair, "", name);
      told[name] = element("dd", pair, `watch-told-${name}`);
    }
    find("values").classList.toggle("many", setup.names.length > 9);
    rows = setup.names.map((name) => {
      const row = element("li", find("values")), bar = element("i", row), mark = element("span", row, "mark");
      element("span", row, "", name.replace(/(?<=.)(LEFT|RIGHT|FIRE)/g, " $1").toLowerCase());
      return { row, bar, mark, worth: element("span", row, "worth") };
    });
    showState();
  }

  function draw(packet) {
    const length = new DataView(packet).getUint32(0, true);
    const next = JSON.parse(new TextDecoder().decode(new Uint8Array(packet, 4, length)));
    let at = 4 + length;
    const take = (count) => packet.slice(at, (at += count));
    const [rowsOf, columns] = next.picture, [stack, height, width] = next.observation;
    next.values = new Float32Array(take(4 * next.values[0]));
    next.size = [width, height];
    find("game").style.setProperty("--slant", columns / rowsOf);
    paint(find("game"), new Uint8Array(take(3 * rowsOf * columns)), columns, rowsOf, 3);
    const seen = new Uint8Array(take(stack * height * width));
    while (frames.length < Math.min(4, stack)) frames.push(frame(frames.length, Math.min(4, stack)));
    frames.forEach((canvas, index) => {
      const from = (stack - frames.length + index) * height * width;
      paint(canvas, seen.subarray(from, from + height * width), width, height, 1);
    });
    remember(next);
    moment = next;
    if (moment.ended && playing) rest = performance.now() + REST;
    for (const name in told) told[name].textContent = name === "lives" ? moment.lives || "-" : moment[name].toLocaleString("en");
    showState();
    showValues();
    plot();
    find("game").dispatchEvent(new CustomEvent("drawn", { detail: moment }));
  }

  function frame(index, count) {
    const figure = element("figure", find("frames")), canvas = element("canvas", figure, "pixels"), age = count - 1 - index;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Frame t - ${age}`);
    element("figcaption", figure, "studio-dim", age ? `t − ${age}` : "t");
    find("seen").textContent = "What the agent sees";
    return canvas;
  }

  function paint(canvas, pixels, width, height, channels) {
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d"), picture = context.createImageData(width, height), data = picture.data;
    for (let from = 0, to = 0; to < data.length; from += channels, to += 4) {
      data[to] = pixels[from];
      data[to + 1] = pixels[from + (channels > 1 ? 1 : 0)];
      data[to + 2] = pixels[from + (channels > 1 ? 2 : 0)];
      data[to + 3] = 255;
    }
    context.putImageData(picture, 0, 0);
  }

  function heat(colours, of) {
    const canvas = find("heat");
    [canvas.width, canvas.height] = of.size;
    canvas.getContext("2d").putImageData(new ImageData(colours, ...of.size), 0, 0);
    find("salient").textContent = `shown: step ${of.step.toLocaleString("en")}`;
  }

  function showState() {
    find("pause").querySelector(".q-icon").textContent = playing ? "pause" : "play_arrow";
    find("speed").textContent = `${SPEEDS[speed]}×`;
    find("turns").setAttribute("aria-pressed", byHand);
    find("turns").querySelector(".block").textContent = byHand ? "Hand back" : "Take over";
    if (closed) return;
    const states = [moment && moment.ended ? "game over" : "", playing ? "" : "paused", byHand ? "you play" : ""];
    const text = states.filter(Boolean).join(" · ");
    if (find("over").textContent !== text) find("over").textContent = text;
  }

  function showValues() {
    const probable = moment.meaning === "probability", values = moment.values, finite = [...values].map((value) => (isFinite(value) ? value : 0));
    const least = Math.min(...finite), greatest = Math.max(...finite.map(Math.abs));
    const span = Math.max(Math.max(...finite) - least, 1e-3 * greatest, 1e-9);
    const taken = moment.ended ? -1 : byHand ? named(new Set([...held, ...tapped])) : moment.action;
    rows.forEach(({ row, bar, mark, worth }, index) => {
      const part = probable ? finite[index] : 0.03 + (0.97 * (finite[index] - least)) / span, wished = byHand && index === moment.action;
      bar.style.transform = `scaleX(${part})`;
      worth.textContent = written(values[index], probable, greatest);
      row.className = index === taken ? "chosen" : wished ? "wished" : "";
      mark.textContent = index === taken ? "▶" : wished ? "◇" : "";
    });
    const meaning = probable ? "Probability of each action" : "Q-value of each action";
    if (find("meaning").textContent !== meaning) find("meaning").textContent = meaning;
    const key = byHand ? "▶ what you do   ◇ what the agent would do" : "▶ the chosen action";
    if (find("key").textContent !== key) find("key").textContent = key;
  }

  function written(value, probable, greatest) {
    if (!isFinite(value)) return String(value);
    if (probable) return value.toFixed(3);
    const digits = 3 - [10, 100, 1000].filter((bound) => greatest >= bound).length;
    return (value < 0 ? "−" : "+") + (greatest >= 1e6 ? Math.abs(value).toExponential(2) : Math.abs(value).toFixed(digits));
  }

  // The value over time

  function remember(next) {
    const newest = past[past.length - 1];
    if (newest && newest.meaning !== next.meaning) past = [];
    if (newest && newest.game === next.game && newest.step >= next.step) past.pop(); // looked at again
    if (newest && (next.game < newest.game || (next.game === newest.game && next.step < newest.step))) past = []; // begun again
    past.push({ game: next.game, step: next.step, meaning: next.meaning, best: Math.max(...next.values) });
    if (past.length > REMEMBERED) past.shift();
  }

  function plot() {
    const canvas = find("plot"), ratio = window.devicePixelRatio, style = getComputedStyle(document.body);
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (canvas.width !== Math.round(width * ratio)) [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    const pen = canvas.getContext("2d"), best = past.map((one) => one.best);
    const low = Math.min(...best), high = Math.max(...best), room = Math.max(high - low, 1e-3 * Math.abs(high), 1e-9);
    const across = (index) => 52 + ((width - 56) * index) / (REMEMBERED - 1);
    const down = (value) => height - 10 - ((height - 20) * (value - low)) / room;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.fillStyle = style.getPropertyValue("--dim");
    pen.font = "11px sans-serif";
    for (const value of [low, high]) pen.fillText(written(value, moment.meaning === "probability", Math.max(Math.abs(low), Math.abs(high))), 0, down(value) + 4);
    pen.strokeStyle = style.getPropertyValue("--line");
    pen.beginPath();
    past.forEach((one, index) => index && one.game !== past[index - 1].game && (pen.moveTo(across(index), 4), pen.lineTo(across(index), height - 4)));
    pen.stroke();
    pen.strokeStyle = style.getPropertyValue("--fill");
    pen.lineWidth = 1.5;
    pen.beginPath();
    best.forEach((value, index) => pen.lineTo(across(index), down(value)));
    pen.stroke();
    find("worth").textContent = moment.meaning === "probability" ? "Probability of the likeliest action" : "Value of the best action";
  }

  return { begin, look, pause, step, faster, slower, turns, saliency };
})();
