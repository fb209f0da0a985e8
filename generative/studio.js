// The drawing: greys and marks of an image's pixels, painted by mouse, touch or keyboard, and told to the page as base64.
const studioDrawings = {};
class StudioDrawing {
  constructor(canvas, width, height) {
    Object.assign(this, { canvas, width, height, tool: "brush", last: null, cursor: null });
    canvas.width = width; canvas.height = height;
    this.greys = new Uint8ClampedArray(width * height);
    this.marks = new Uint8Array(width * height);
    this.radius = 1.35 * Math.max(1, width / 28);
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.cursor = null;
      this.last = this.place(event);
      this.stroke(this.last, this.last);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.last) return;
      const here = this.place(event);
      this.stroke(this.last, here);
      this.last = here;
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { if (this.last) { this.last = null; this.tell(); } });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => { this.cursor = null; this.show(); });
    this.show();
  }
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width * this.width, (event.clientY - box.top) / box.height * this.height];
  }
  // Arrow keys move a cursor, with Shift they paint on the way; Space and Enter paint where it is.
  key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0], Enter: [0, 0] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const from = this.cursor || [this.width / 2, this.height / 2];
    const inside = (value, most) => Math.min(most - 0.5, Math.max(0.5, value));
    this.cursor = [inside(from[0] + step[0], this.width), inside(from[1] + step[1], this.height)];
    const paints = event.shiftKey || (step[0] === 0 && step[1] === 0);
    if (paints) { this.stroke(from, this.cursor); this.tell(); } else this.show();
  }
  stroke(from, to) {
    const steps = Math.max(1, Math.ceil(2 * Math.hypot(to[0] - from[0], to[1] - from[1])));
    for (let index = 0; index <= steps; index++) this.dab(from[0] + (to[0] - from[0]) * index / steps, from[1] + (to[1] - from[1]) * index / steps);
    this.show();
  }
  dab(x, y) {
    const reach = this.tool === "brush" ? this.radius : 1.6 * this.radius;
    for (let row = Math.max(0, Math.floor(y - reach - 1)); row < Math.min(this.height, y + reach + 1); row++)
      for (let column = Math.max(0, Math.floor(x - reach - 1)); column < Math.min(this.width, x + reach + 1); column++) {
        const ink = Math.max(0, Math.min(1, reach + 0.5 - Math.hypot(column + 0.5 - x, row + 0.5 - y))), at = row * this.width + column;
        if (this.tool === "brush") this.greys[at] = Math.max(this.greys[at], 255 * ink);
        else if (ink >= 0.5 && this.tool === "erase") this.greys[at] = this.marks[at] = 0;
        else if (ink >= 0.5) this.marks[at] = 1;
      }
  }
  show() {
    const context = this.canvas.getContext("2d"), picture = context.createImageData(this.width, this.height);
    for (let at = 0; at < this.greys.length; at++) {
      const hatched = this.marks[at] && (Math.floor(at / this.width) + at) % 2;
      const grey = this.greys[at];
      picture.data.set(hatched ? [217, 116, 26, 255] : [grey, grey, grey, 255], 4 * at);
    }
    if (this.cursor) picture.data.set([95, 170, 255, 255], 4 * (Math.floor(this.cursor[1]) * this.width + Math.floor(this.cursor[0])));
    context.putImageData(picture, 0, 0);
  }
  tell() {
    const text = (bytes) => btoa(String.fromCharCode.apply(null, bytes));
    this.canvas.dispatchEvent(new CustomEvent("drawn", { detail: text(this.greys) + "," + text(this.marks) }));
  }
  put(greys) {
    const bytes = atob(greys);
    for (let at = 0; at < this.greys.length; at++) this.greys[at] = bytes.charCodeAt(at);
    this.marks.fill(0);
    this.show();
    this.tell();
  }
}
function studioDrawing(id, width, height) {
  const canvas = document.getElementById(id);
  if (canvas) studioDrawings[id] = new StudioDrawing(canvas, width, height);
  else setTimeout(() => studioDrawing(id, width, height), 20);
}
