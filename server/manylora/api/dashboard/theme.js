// Runs before the first paint, so that chosen colours and a chosen language do not flash. Not a module: modules run too late.
(function () {
  "use strict";
  const chosen = (name) => {
    try {
      return localStorage.getItem(`manylora.${name}`);
    } catch {
      return null; // storage is switched off: follow the system
    }
  };
  const theme = chosen("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  const language = chosen("language") ?? navigator.languages.find((one) => /^(en|zh)\b/i.test(one)) ?? "en";
  document.documentElement.lang = language.startsWith("zh") ? "zh-CN" : "en";
})();
