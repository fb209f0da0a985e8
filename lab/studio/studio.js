// Light or dark: as the system has it, until somebody chooses; the browser keeps the choice.
function studioShade(dark) {
  const shade = () => (window.Quasar ? Quasar.Dark.set(dark) : setTimeout(shade, 20));
  shade();
}
function studioTurn() {
  const dark = !document.body.classList.contains("body--dark");
  localStorage.setItem("dreamplay-dark", dark);
  studioShade(dark);
}
if (localStorage.getItem("dreamplay-dark") !== null) {
  window.addEventListener("load", () => setTimeout(() => studioShade(localStorage.getItem("dreamplay-dark") === "true"), 0));
}
