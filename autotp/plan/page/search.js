const box = document.getElementById("search");
const rows = [...document.querySelectorAll("#parameters tbody tr")];
const count = document.getElementById("count");
box.parentElement.hidden = false;
box.addEventListener("input", () => {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  count.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
});
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#reason-"]');
  const reason = link && document.getElementById(link.hash.slice(1));
  if (reason) reason.open = true;
});
