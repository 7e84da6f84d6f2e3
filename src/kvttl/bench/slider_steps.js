() => {
  // In the page: the ms from each key to the first frame after its image has loaded.
  const image = document.querySelector('.kv-picture');
  window.kvKey = 0; window.kvSteps = [];
  document.addEventListener('keydown', () => { window.kvKey = performance.now(); }, true);
  image.addEventListener('load', () => requestAnimationFrame(() => {
    if (window.kvKey) window.kvSteps.push(performance.now() - window.kvKey);
    window.kvKey = 0;
  }));
}
