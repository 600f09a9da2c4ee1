// Stands at the end of the page: uses it as a person would, and writes down what came of it.
const visit = () => {
  const found = {}, press = (key, on = document.body) => on.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  const shown = () => { const c = document.querySelector("#big canvas");
    return Array.from(c.toDataURL()).reduce((a, v) => (a * 31 + v.charCodeAt(0)) % 1e9, 7); };
  const read = () => $("read").textContent;
  found.cards = $("list").children.length; found.path = $("path").textContent; found.facts = $("facts").textContent;
  found.bars = [...$("bars").children].map(b => b.textContent);
  found.strip = $("strip").querySelectorAll("button").length;
  found.rollout = shown(); found.said = read();
  press("m"); found.method = $("method").value; found.relevance = shown();
  [...$("bars").querySelectorAll("button")].find(b => !b.disabled && b.getAttribute("aria-pressed") === "false").click();
  found.other = shown(); found.otherSaid = read();
  press("m"); found.again = shown();
  press("s"); found.sharp = shown(); press("s");
  const big = $("big"), seen = big.querySelector(".seen").getBoundingClientRect();
  big.dispatchEvent(new PointerEvent("pointermove", {clientX: seen.left + seen.width * .99, clientY: seen.top + 2, bubbles: true}));
  found.hover = read(); found.hovered = shown(); found.mark = $("cell").hidden === false;
  big.dispatchEvent(new PointerEvent("pointerleave")); found.left = shown();
  big.focus(); press("ArrowRight", big); press("ArrowDown", big); found.walked = read(); press("Escape"); found.escaped = shown();
  $("strip").querySelector("button").click(); found.head = read(); found.headShown = shown(); $("back").click(); found.back = shown();
  $("strength").value = 0; $("strength").dispatchEvent(new Event("input"));
  found.invisible = getComputedStyle(document.querySelector("#big canvas")).opacity;
  press("]"); found.visible = getComputedStyle(document.querySelector("#big canvas")).opacity;
  press("j"); found.next = $("path").textContent; press("k"); found.before = $("path").textContent;
  $("query").value = "2.jpg"; $("query").dispatchEvent(new Event("input")); found.found = $("list").children.length;
  $("theme").click(); found.paper = getComputedStyle(document.body).backgroundColor;
  $("theme").click(); found.otherPaper = getComputedStyle(document.body).backgroundColor;
  found.wide = document.documentElement.scrollWidth <= innerWidth;
  document.body.append(Object.assign(document.createElement("pre"), {id: "found", textContent: JSON.stringify(found)}));
};
const wait = () => $("strip").children.length ? visit() : setTimeout(wait, 20);  // the strip comes last
wait();
