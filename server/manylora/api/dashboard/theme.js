// Runs before the first paint, so that a chosen theme does not flash. Not a module: modules run too late.
(function () {
  "use strict";
  let chosen = null;
  try {
    chosen = localStorage.getItem("manylora.theme");
  } catch {
    // storage is switched off: follow the system
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
