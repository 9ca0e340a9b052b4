// Draws the figures with the colours of the page's mode, and again when the mode changes.
"use strict";
(function () {
  const config = { responsive: true, displayModeBar: false };

  function withColours(text) {
    const colours = getComputedStyle(document.documentElement);
    return JSON.parse(text, (_key, value) =>
      typeof value === "string" && value.startsWith("var(--")
        ? colours.getPropertyValue(value.slice(4, -1)).trim()
        : value
    );
  }

  function draw() {
    for (const place of document.querySelectorAll("[data-figure]")) {
      const figure = withColours(document.getElementById(place.dataset.figure).textContent);
      Plotly.react(place, figure.data, figure.layout, config);
    }
  }

  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
