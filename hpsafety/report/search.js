"use strict";
// Filters the samples: a row stays when it holds every word, folded text included; folded text stays folded.
(function () {
  const box = document.getElementById("search");
  const told = document.getElementById("found");
  if (!box) return;
  let rows = null;
  function filter() {
    if (rows === null) {
      rows = Array.from(document.querySelectorAll("#samples tbody tr"), (tr) => [tr, tr.textContent.toLowerCase()]);
    }
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let kept = 0;
    for (const [tr, text] of rows) {
      const match = words.every((word) => text.includes(word));
      if (tr.hidden === match) tr.hidden = !match;
      kept += match ? 1 : 0;
    }
    told.textContent = kept + " of " + rows.length + " shown";
  }
  box.addEventListener("input", filter);
})();
