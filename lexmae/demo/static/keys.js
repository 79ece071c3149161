// Keys: "/" goes to the search box, the arrows go through the results. The page works without this file.
"use strict";

const box = document.getElementById("q");
const results = Array.from(document.querySelectorAll("a.result"));

function move(step) {
  const at = results.indexOf(document.activeElement);
  const next = at + step;
  if (next < 0) {
    box.focus();
  } else if (next < results.length) {
    results[next].focus();
    results[next].closest("li").scrollIntoView({ block: "nearest" });
  }
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) {
    return;
  }
  const inBox = document.activeElement === box;
  if (event.key === "/" && !inBox) {
    event.preventDefault();
    box.focus();
    box.select();
  } else if (event.key === "Escape" && inBox) {
    box.blur();
  } else if (event.key === "ArrowDown" && results.length > 0 && (inBox || results.includes(document.activeElement))) {
    event.preventDefault();
    move(1);
  } else if (event.key === "ArrowUp" && results.includes(document.activeElement)) {
    event.preventDefault();
    move(-1);
  }
});

if (box.value === "") {
  box.focus();
}
