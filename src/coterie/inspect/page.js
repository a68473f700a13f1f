// Marks the section in view in the navigation. The page is whole without it.
(() => {
  const links = new Map([...document.querySelectorAll("nav a")].map(a => [a.hash.slice(1), a]));
  const sections = [...document.querySelectorAll("main section")];
  const mark = () => {
    const edge = document.querySelector("header").offsetHeight + 40;
    let current = sections[0];
    for (const s of sections) if (s.getBoundingClientRect().top <= edge) current = s;
    for (const [id, a] of links) a.classList.toggle("here", current && id === current.id);
  };
  addEventListener("scroll", mark, { passive: true });
  mark();
})();
