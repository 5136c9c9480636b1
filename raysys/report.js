// Hover and touch text of the charts, and the copy button. The page says everything without it.
(function () {
  "use strict";
  var tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "status");
  document.body.appendChild(tip);

  function show(dot) {
    tip.textContent = dot.getAttribute("data-tip");
    tip.hidden = false;
    var at = dot.querySelector(".reach").getBoundingClientRect();
    var box = tip.getBoundingClientRect();
    var wide = document.documentElement.clientWidth;
    var left = Math.min(Math.max(at.left + at.width / 2 - box.width / 2, 6), wide - box.width - 6);
    var above = at.top - box.height - 4;
    tip.style.left = left + window.scrollX + "px";
    tip.style.top = (above < 4 ? at.bottom + 4 : above) + window.scrollY + "px";
  }

  function follow(event) {
    var dot = event.target.closest ? event.target.closest(".dot") : null;
    if (dot) show(dot); else tip.hidden = true;
  }
  document.addEventListener("pointerover", follow);
  document.addEventListener("pointerdown", follow);
  document.addEventListener("scroll", function () { tip.hidden = true; }, { passive: true });

  document.querySelectorAll("[data-copy]").forEach(function (button) {
    if (!navigator.clipboard) return;
    button.hidden = false;
    button.addEventListener("click", function () {
      var text = document.getElementById(button.getAttribute("data-copy")).textContent;
      navigator.clipboard.writeText(text).then(function () { button.textContent = "Copied"; }, function () {});
    });
  });
})();
