// Settings of one run or of several side by side: searched here, differences marked.
export default {
  props: { names: Array, rows: Array },
  data: () => ({ text: "", whole: false }),
  computed: {
    several() {
      return this.names.length > 1;
    },
    shown() {
      const words = this.text.toLowerCase().split(/\s+/);
      const has = (row) => `${row.key} ${row.values.join(" ")}`.toLowerCase();
      return this.rows.filter((row) => (!this.several || this.whole || row.differs) && words.every((word) => has(row).includes(word)));
    },
  },
  template: `
    <div class="w-full">
      <div class="runs-tools" role="search">
        <input v-model="text" type="search" placeholder="Search settings" aria-label="Search settings" class="field runs-search">
        <label v-if="several"><input type="checkbox" v-model="whole"> show all settings</label>
        <span class="studio-dim" role="status">{{ shown.length }} of {{ rows.length }} settings</span>
      </div>
      <div class="settings-scroll">
        <table class="settings" :class="{ several }">
          <thead><tr><th>Setting</th><th v-for="name in names" :key="name">{{ several ? name : 'Value' }}</th></tr></thead>
          <tbody>
            <tr v-for="row in shown" :key="row.key" :class="{ differs: several && row.differs }">
              <td>{{ row.key }}<small v-if="whole && row.differs">differs</small></td>
              <td v-for="(value, place) in row.values" :key="place">{{ value }}</td>
            </tr>
          </tbody>
        </table>
      </div>
      <p v-if="!shown.length" class="studio-dim">{{ text ? 'No setting fits this search.' : 'These runs do not differ in any setting.' }}</p>
    </div>`,
};
